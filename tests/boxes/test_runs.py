"""Runs over two boxes through what happens at home: a power cut, a head that restarts, a box that its owner wants back.

Each ends with every sample trained exactly once, and prints for how many seconds nobody trained.
"""

import sys
import time
from collections import Counter

import pytest

from jobs.easyvqa import export_easy_vqa
from smolray.audit import consumed
from smolray.events import read_events, surviving
from tests.boxes.conftest import ROOT

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]  # on a machine that others use a run takes its time
QUESTIONS = 1500
EPOCHS = 2
SAVE_STEPS = 10
WATCH = """
import sys
from smolray.config import load_config
from smolray.jobs_client import connect
from smolray.keep_alive import keep_alive
arguments = sys.argv[2:]
for text in keep_alive(connect(sys.argv[1]), load_config(arguments[1], arguments[2:]), arguments):
    print(text, end="", flush=True)
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder that all boxes see, as an NFS share or a bucket is: data and runs."""
    folder = tmp_path_factory.mktemp("shared")
    export_easy_vqa(folder, limit=QUESTIONS)
    return folder


class Watched:
    """A run submitted from the laptop by the watcher that keeps it alive."""

    def __init__(self, cluster, shared, name, *overrides):
        self.cluster, self.name, self.run_dir = cluster, name, f"{shared}/runs/{name}"
        self.log = cluster.lan["laptop"].folder / "srv" / f"{name}.log"
        arguments = [
            "--config", "jobs/configs/demo.yaml", f"name={name}", f"storage={shared}/runs", f"data.train={shared}/train.parquet",
            "model.path=tiny", "train.per_device_train_batch_size=8", "train.global_batch=2", f"train.num_train_epochs={EPOCHS}", "train.audit=true",
            f"checkpoint.save_steps={SAVE_STEPS}", "evaluate.eval_epochs=0", "resources.num_workers=[1,2]", "resources.cpus_per_worker=0.6",
            "resources.max_failures=5", *overrides,
        ]  # fmt: skip
        environment = [f"{k}={v}" for k, v in {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": cluster.token, "PYTHONPATH": str(ROOT)}.items()]
        command = ["env", "-C", str(ROOT), *environment, sys.executable, "-c", WATCH, cluster.address, *arguments]
        self.process = cluster.lan["laptop"].start(*command, log=f"{name}.log")

    def events(self, kind):
        return [e for e in read_events(self.run_dir) if e["event"] == kind]

    def wait(self, done, seconds, what):
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline, f"{what}: not within {seconds} s\n{self.told()}"
            assert self.process.poll() is None or done(), f"{what}: the watcher ended with {self.process.poll()}\n{self.told()}"
            time.sleep(0.3)

    def told(self):
        return self.log.read_text()[-4000:] + str([e for e in read_events(self.run_dir) if e["event"] != "step"][-6:]) + self.cluster.logs()[-3000:]

    def reaches(self, step, seconds=400):
        self.wait(lambda: any(e["step"] >= step for e in self.events("step")), seconds, f"step {step}")

    def trains_again_after(self, moment, seconds):
        """Seconds from `moment` to the first step of a later attempt."""
        def again():
            return [e["time"] for e in self.events("step") if e["time"] > moment and e["attempt"] > self.attempt]

        self.attempt = max(e["attempt"] for e in self.events("start"))
        self.wait(again, seconds, "training again")
        return min(again()) - moment

    def finishes(self, seconds=400):
        self.wait(lambda: self.process.poll() is not None, seconds, "the end")
        assert self.process.returncode == 0, self.told()
        events = read_events(self.run_dir)
        assert events[-1]["event"] == "end" and events[-1]["status"] == "finished"
        steps = [e["step"] for e in surviving(events) if e["event"] == "step"]
        assert steps == list(range(1, len(steps) + 1))
        history = consumed(self.run_dir)
        assert sorted(history) == list(range(EPOCHS))
        for rows in history.values():
            assert Counter(i for _, i in rows) == Counter(f"train-{i}" for i in range(QUESTIONS))


def test_a_worker_that_loses_power_costs_only_the_steps_since_the_last_checkpoint(cluster, shared):
    run = Watched(cluster, shared, "worker-cut")
    run.reaches(SAVE_STEPS + 3)
    assert run.events("start")[-1]["workers"] == 2
    moment, last = time.time(), run.events("step")[-1]["step"]
    cluster.lan["loft"].off()
    seconds = run.trains_again_after(moment, 240)
    [resumed] = run.events("resume")
    print(f"worker cut at step {last}: on 1 worker again from step {resumed['step']} after {seconds:.1f} s")
    assert resumed["step"] >= last - SAVE_STEPS and run.events("start")[-1]["workers"] == 1
    cluster.lan["loft"].on()
    cluster.start("loft")
    run.finishes()
    cluster.wait_alive("head", "den", "loft")


def test_a_run_whose_head_loses_power_is_submitted_again_untouched_by_hand(cluster, shared):
    run = Watched(cluster, shared, "head-cut")
    run.reaches(SAVE_STEPS + 3)
    moment, last = time.time(), run.events("step")[-1]["step"]
    cluster.head.off()
    time.sleep(3)
    cluster.head.on()
    cluster.start("head")
    seconds = run.trains_again_after(moment, 240)
    resumed = run.events("resume")[-1]["step"]
    print(f"head cut at step {last}: training again from step {resumed} after {seconds:.1f} s")
    assert "was lost: submitting it again" in run.log.read_text()
    run.finishes()


def test_a_drained_box_is_empty_and_its_run_goes_on_without_losing_a_step(cluster, shared):
    run = Watched(cluster, shared, "drained")
    run.reaches(SAVE_STEPS + 3)
    told = cluster.python(
        f"import os; os.chdir({str(ROOT)!r})\nfrom smolray.cluster import drain\nfrom smolray.jobs_client import connect\n"
        f"for line in drain(connect('{cluster.address}'), '{cluster.address}', 'loft', '{shared}/runs'): print(line, flush=True)",
        box="laptop",
        timeout=400,
    )
    print(told)
    assert "loft takes no new work" in told and "drained stopped at step" in told and "trains on with 1 worker(s)" in told
    stop, resume = run.events("end")[0]["step"], run.events("resume")[-1]["step"]
    assert stop == resume, "nothing is trained twice"
    assert cluster.alive() == {"head", "den"}
    run.finishes()
