"""The driver of a trial outlives a storage that is away for a moment, and does not launch a run that its former driver
is still stopping.
"""

import threading
import time
from types import SimpleNamespace

import pytest

from smolray.config import load_config
from smolray.run.events import EventLog
from smolray.run.status import request_stop
from smolray.tune.trial import RunTrial


@pytest.fixture
def log(tmp_path):
    """Of the run of trial 1, which trains and has one evaluated checkpoint."""
    log = EventLog(str(tmp_path / "find-1"))
    log.write("start", workers=1, total_steps=9)
    log.write("checkpoint", step=4, path="step-4", accuracy=0.5, loss=1.0)
    return log


@pytest.fixture
def trial(tmp_path):
    """Trial 1, without an actor around it."""
    base = load_config(
        None, base={"name": "find", "storage": str(tmp_path), "data": {"train": "a", "validation": "b"}, "search": {}}
    )
    trial = RunTrial.__new__(RunTrial)
    trial._trial_info = SimpleNamespace(trial_name="find-1")
    trial.setup({"optimizer.learning_rate": 1e-3, "number": 1, "reported": 0}, base.model_dump(mode="json"))
    return trial


def test_a_storage_that_is_away_for_a_moment_does_not_end_a_trial(trial, log, tmp_path):
    log.write("end", status="finished", step=4)
    trial._begin()
    file, away = tmp_path / "find-1" / "events.jsonl", tmp_path / "away"
    file.rename(away)
    file.mkdir()  # reading it is an OSError

    def return_it():
        file.rmdir()
        away.rename(file)

    back = threading.Timer(0.4, return_it)
    back.start()
    results = [trial.step(), trial.step()]
    back.join()
    assert [(r["accuracy"], r["step"], r["over"], r["failed"]) for r in results] == [
        (0.5, 4, False, ""),
        (0.5, 4, True, ""),
    ]


def test_a_stopping_run_has_ended_before_it_is_launched_again(trial, log, tmp_path):
    request_stop(str(tmp_path / "find-1"))
    began = time.monotonic()
    end = threading.Timer(0.7, log.write, ("end",), {"status": "finished", "step": 9})  # it came to its end instead
    end.start()
    trial._begin()
    end.join()
    assert time.monotonic() - began > 0.6
    assert trial.thread is None, "there is nothing to launch any more"
