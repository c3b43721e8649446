"""One driver at a time owns a run; one that is gone is followed, and one that was followed stops writing."""

import json
import multiprocessing
import os
import subprocess
import sys
import time

import pytest

from smolray import storage
from smolray.run import lease
from smolray.run.lease import LeaseError, LeaseLostError, Owner, gone_owner, owning, read_owner, require_owner

HOLD = """
import sys, time
from smolray.run.lease import owning
with owning(sys.argv[1], "train"):
    print("mine", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that owns the run."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "mine\n"
    yield process
    process.kill()
    process.wait()


def write_owner(run_dir, age=0.0, **fields):
    """The owner of a driver on another machine, who wrote `age` seconds ago."""
    owner = Owner("id", "train", "elsewhere", 12, "another boot", "5", time.time() - 100)
    uri = storage.join(str(run_dir), "control", "owner.json")
    storage.write_bytes(uri, json.dumps(owner.__dict__ | fields).encode())
    os.utime(uri, (time.time() - age,) * 2)


def test_a_second_driver_is_refused_with_the_owner_and_how_to_take_over(tmp_path, other):
    began = time.monotonic()
    with pytest.raises(LeaseError) as refused, owning(str(tmp_path), "train"):
        pass
    assert time.monotonic() - began < 2
    for part in (f"process {other.pid} on ", "since 20", f"smolray stop {tmp_path.name}", "delete ", "owner.json"):
        assert part in str(refused.value)


def test_a_driver_that_was_killed_is_followed_at_once(tmp_path, other):
    other.kill()
    other.wait()
    began = time.monotonic()
    with owning(str(tmp_path), "train") as mine:
        assert time.monotonic() - began < 2
        assert read_owner(str(tmp_path)).owner.id == mine.id
    assert read_owner(str(tmp_path)) is None, "released: the next one need not wait"


def test_a_driver_of_another_machine_is_followed_when_it_is_silent(tmp_path):
    write_owner(tmp_path, age=lease.STALE_SECONDS + 1)
    with owning(str(tmp_path), "train"):
        pass


def test_a_driver_of_another_machine_that_gives_signs_of_life_is_not_followed(tmp_path, monkeypatch):
    write_owner(tmp_path, age=1)
    said = []

    def beat(text):
        said.append(text)
        write_owner(tmp_path)

    with pytest.raises(LeaseError, match="process 12 on elsewhere"), owning(str(tmp_path), "train", beat):
        pass
    assert len(said) == 1 and "has not given a sign of life yet" in said[0]


def test_a_run_whose_driver_writes_its_report_is_waited_for(tmp_path, other):
    (tmp_path / "events.jsonl").write_text('{"event": "end", "time": 1, "status": "stopped"}\n')

    def end(text):
        assert "is writing its report" in text
        other.kill()
        other.wait()

    with owning(str(tmp_path), "train", end):
        pass


def test_who_has_lost_a_run_writes_nothing_more(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.05)
    with owning(str(tmp_path), "train") as mine:
        require_owner(str(tmp_path), mine.id)
        assert mine.loss() is None
        write_owner(tmp_path)
        assert mine.lost.wait(5)
        assert "process 12 on elsewhere" in str(mine.loss())
        with pytest.raises(LeaseLostError, match="Nothing more is written"):
            require_owner(str(tmp_path), mine.id)
    assert read_owner(str(tmp_path)).owner.id == "id", "the new owner's file is left alone"


def test_a_deleted_file_gives_the_run_away(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.05)
    with owning(str(tmp_path), "train") as mine:
        storage.delete(mine.uri)
        assert mine.lost.wait(5)


def take(run_dir, start, results):
    start.wait()
    try:
        with owning(run_dir, "train"):
            results.put("won")
            time.sleep(5)
    except LeaseError:
        results.put("refused")


def race(run_dir, drivers=4):
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    processes = [context.Process(target=take, args=(run_dir, start, results)) for _ in range(drivers)]
    for process in processes:
        process.start()
    start.set()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.kill()
    return sorted(found)


def test_of_many_starts_at_once_one_wins(tmp_path):
    assert race(str(tmp_path)) == ["refused"] * 3 + ["won"]


def test_status_knows_a_driver_that_is_gone(tmp_path, other):
    assert gone_owner(str(tmp_path), time.time(), 60) is None
    other.kill()
    other.wait()
    assert gone_owner(str(tmp_path), time.time(), 60).pid == other.pid
