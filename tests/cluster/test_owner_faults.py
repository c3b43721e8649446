"""Who runs a run, and how it stops, as commands: two starts of one name, signals in each phase, and kills of every
process, with an audit of every sample and losses that do not differ.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from smolray.run.events import read_events, surviving
from smolray.run.status import run_status
from smolray.train.audit import consumed

pytestmark = pytest.mark.faults
KILLS = int(os.environ.get("SMOLRAY_TEST_KILLS", "20"))
VICTIMS = ("driver", "worker", "data process", "raylet", "gcs_server", "checkpoint")
GONE_SECONDS = 60  # until nothing of a killed driver is left
WAIT_SECONDS = 600
QUESTIONS = 96


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Questions without images, with ids."""
    file = tmp_path_factory.mktemp("rows") / "train.jsonl"
    lines = [{"id": f"q{i}", "question": f"what is {i} and {i % 7}?", "answer": str(i % 7)} for i in range(QUESTIONS)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


class Command:
    """`smolray train` as a person starts it, in a process group of its own."""

    def __init__(self, folder: Path, rows: Path, name: str, *overrides: str) -> None:
        self.run_dir = str(folder / "runs" / name)
        self.log = folder / f"{name}-{time.monotonic_ns()}.log"
        settings = [
            *(f"name={name}", f"storage={folder}/runs", f"data.train={rows}", "model.path=tiny", "model.dtype=float32"),
            *("train.per_device_train_batch_size=2", "train.audit=true", "checkpoint.save_steps=3"),
            *("resources.num_workers=1", "resources.cpus_per_worker=0.5", "resources.max_failures=3", *overrides),
        ]
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "smolray", "train", *settings],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": os.getcwd()},
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self.log.read_text()

    def events(self, kind: str) -> list:
        return [e for e in read_events(self.run_dir) if e["event"] == kind]

    def wait_for(self, kind: str, count: int = 1) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while len(self.events(kind)) < count:
            assert self.process.poll() is None, self.said[-3000:]
            assert time.monotonic() < deadline, self.said[-3000:]
            time.sleep(0.1)

    def tree(self) -> list[psutil.Process]:
        """The driver and all that it has started, in whatever session."""
        return [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.fixture
def start(tmp_path, rows):
    commands = []

    def begin(name, *overrides):
        commands.append(Command(tmp_path, rows, name, *overrides))
        return commands[-1]

    yield begin
    for command in commands:
        command.end()


def test_the_second_of_two_starts_of_one_name_is_refused(start):
    first = start("twice", "train.num_train_epochs=50")
    first.wait_for("preparing")
    second = start("twice", "train.num_train_epochs=50")
    assert second.process.wait(WAIT_SECONDS) == 2
    assert f"process {first.process.pid} on " in second.said and "Traceback" not in second.said
    assert len(first.events("preparing")) == 1
    first.process.send_signal(signal.SIGINT)
    first.process.wait(WAIT_SECONDS)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("phase", ["preparing", "launch", "start", "step", "evaluating"])
def test_a_signal_in_each_phase_saves_says_how_to_go_on_and_ends(start, rows, phase, number, code):
    evaluated = [f"data.validation={rows}", "train.max_steps=3"] if phase == "evaluating" else []
    command = start("signalled", "train.num_train_epochs=50", *evaluated)
    command.wait_for(phase)
    os.killpg(command.process.pid, number)  # as a terminal and `timeout` do: the whole group
    assert command.process.wait(WAIT_SECONDS) == code, command.said[-3000:]
    assert "To go on: smolray resume signalled" in command.said
    for word in ("Traceback", "*** SIG", "ray::"):
        assert word not in command.said
    assert run_status(command.run_dir).state in ("stopped", "finished")
    if phase in ("step", "evaluating"):
        assert "Safe: step " in command.said


def test_the_second_signal_ends_at_once(start):
    command = start("hurried", "train.num_train_epochs=50")
    command.wait_for("preparing")
    began = time.monotonic()
    for _ in range(2):
        command.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    assert command.process.wait(30) == 143 and time.monotonic() - began < 30
    assert run_status(command.run_dir).state == "stopped"


def test_nothing_is_left_of_a_driver_that_was_killed(start):
    command = start("killed", "train.num_train_epochs=50")
    command.wait_for("step")
    tree = command.tree()
    assert len(tree) > 5
    command.process.kill()
    _, alive = psutil.wait_procs(tree, timeout=GONE_SECONDS)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    command.process.wait()
    assert run_status(command.run_dir).state == "lost"


@pytest.mark.parametrize("victim", ["raylet", "gcs_server"])
def test_a_ray_that_dies_is_told_in_our_words(start, victim):
    command = start("orphan", "train.num_train_epochs=50")
    command.wait_for("checkpoint")
    kill(command, victim, random.Random(0))
    assert command.process.wait(WAIT_SECONDS) == 2, command.said[-3000:]
    last = command.said.strip().splitlines()[-1]
    assert victim in last and "Safe: step " in last and "smolray resume orphan" in last
    assert "Traceback" not in command.said


@pytest.mark.timeout(7200)  # a start is half a minute on two cores
def test_kills_of_every_process_cost_no_sample_and_change_no_loss(start):
    quiet = start("quiet", "train.num_train_epochs=3")
    assert quiet.process.wait(WAIT_SECONDS) == 0, quiet.said[-3000:]
    expected = losses(quiet.run_dir)

    rng, kills = random.Random(1), 0
    while kills < KILLS:  # a run that ends before it was killed often enough is followed by another
        name = f"harried-{kills}"
        kills = survive(start, name, rng, kills)
        found = losses(f"{Path(quiet.run_dir).parent}/{name}")
        assert max(abs(found[step] - expected[step]) for step in expected) == 0.0
        assert found.keys() == expected.keys()
        for rows_of_epoch in consumed(f"{Path(quiet.run_dir).parent}/{name}").values():
            assert Counter(i for _, i in rows_of_epoch) == Counter(f"q{i}" for i in range(QUESTIONS))


def survive(start, name: str, rng: random.Random, kills: int) -> int:
    """Start a run again until it has finished, killing one process at a time; returns the kills so far."""
    for _ in range(2 * KILLS):
        command = start(name, "train.num_train_epochs=3", "resources.max_failures=3")
        command.wait_for("step", len(command.events("step")) + rng.randint(1, 12)) if kills < KILLS else None
        if kills < KILLS and kill(command, VICTIMS[kills % len(VICTIMS)], rng):
            kills += 1
        command.process.wait(WAIT_SECONDS)
        if run_status(command.run_dir).state == "finished":
            return kills
    raise AssertionError(f"{name} has not finished: {command.said[-3000:]}")


def kill(command: Command, victim: str, rng: random.Random) -> bool:
    """kill -9 of one process of the run; False where it is not there (any more)."""
    if victim == "checkpoint":  # the worker, while it writes one
        deadline = time.monotonic() + 120
        while command.process.poll() is None and time.monotonic() < deadline:
            folders = list(Path(command.run_dir, "checkpoints").glob("step-*"))
            if any(not (folder / "manifest.json").exists() for folder in folders):
                break
    name = {"worker": "RayTrainWorker", "checkpoint": "RayTrainWorker", "data process": "ray::"}.get(victim, victim)
    try:
        tree = command.tree()
        found = tree[:1] if victim == "driver" else [p for p in tree if name in " ".join(p.cmdline()[:1])]
        rng.choice(found).kill()
    except (psutil.NoSuchProcess, IndexError):
        return False
    return True


def losses(run_dir: str) -> dict[int, float]:
    """Step -> loss of the surviving history."""
    return {e["step"]: e["loss"] for e in surviving(read_events(run_dir)) if e["event"] == "step"}
