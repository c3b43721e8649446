"""When an elastic run is asked to save and start anew with more workers, on a real local Ray of four cores."""

import json
import time
from pathlib import Path

import pytest

from smolray import storage
from smolray.config import load_config
from smolray.launch.elastic import ROOM_POLLS, ElasticMonitor
from smolray.run.events import EventLog, EventTail


@pytest.fixture
def run(ray_cluster, tmp_path):
    return load_config(
        None, [f"storage={tmp_path}", "name=elastic", "resources.num_workers=[1,2]", "train.global_batch=2"]
    )


def trained(run, workers, seconds, left):
    """Log that a group began `seconds` ago, has done one step and has `left` to do."""
    began = json.dumps({"event": "start", "time": time.time() - seconds, "attempt": 1, "workers": workers})
    storage.append_text(storage.join(run.run_dir, "events.jsonl"), began + "\n")
    EventLog(run.run_dir).write("step", step=1, total_steps=1 + left)


def asked(run, workers, left, each, polls=ROOM_POLLS):
    """Whether a run of `workers` with `left` steps of a second to go was asked, where one more takes `each`."""
    elastic_monitor, tail = ElasticMonitor(run, each), EventTail(run.run_dir)
    trained(run, workers, 1.0, left)
    for _ in range(polls):
        elastic_monitor._look(tail)
    return Path(elastic_monitor.flag).exists()


def test_a_run_that_could_be_larger_is_asked_to_save_and_start_anew(run):
    assert asked(run, 1, 600, {"CPU": 1.0})


@pytest.mark.parametrize(
    ("workers", "left", "each", "polls"),
    [
        pytest.param(2, 600, {"CPU": 1.0}, 5, id="as many as it may have"),
        pytest.param(1, 10, {"CPU": 1.0}, 5, id="about to end"),
        pytest.param(1, 600, {"CPU": 100.0}, 5, id="no node has the cores"),
        pytest.param(1, 600, {"CPU": 1.0, "GPU": 1.0}, 5, id="no node has a GPU"),
        pytest.param(1, 600, {"CPU": 1.0}, ROOM_POLLS - 1, id="free for a moment"),
    ],
)
def test_a_run_is_left_alone_where_a_restart_would_bring_nothing(run, workers, left, each, polls):
    assert not asked(run, workers, left, each, polls)


def test_a_restart_that_brought_no_worker_is_not_tried_again(run):
    elastic_monitor = ElasticMonitor(run, {"CPU": 1.0})
    for expected in (True, False):
        tail = EventTail(run.run_dir, skip=True)
        with elastic_monitor.watching():  # takes the flag away
            trained(run, 1, 1.0, 600)
            for _ in range(ROOM_POLLS + 2):
                elastic_monitor._look(tail)
            assert Path(elastic_monitor.flag).exists() == expected
