"""When an elastic run is asked to save and start anew with more workers, on a real local Ray of four cores."""

from pathlib import Path

import pytest

from smolray.config import load_config
from smolray.elastic import ROOM_POLLS, Growth
from smolray.events import EventLog, EventTail


@pytest.fixture
def run(ray_cluster, tmp_path):
    return load_config(None, [f"storage={tmp_path}", "name=elastic", "resources.num_workers=[1,2]"])


def asked(run, workers, eta, each, polls=ROOM_POLLS):
    """Whether a run of `workers` with `eta` seconds to go was asked, where one more takes `each`."""
    growth, tail, log = Growth(run, each), EventTail(run.run_dir), EventLog(run.run_dir)
    log.write("start", workers=workers)
    log.write("step", step=1, eta_seconds=eta)
    for _ in range(polls):
        growth._look(tail)
    return Path(growth.flag).exists()


def test_a_run_that_could_be_larger_is_asked_to_save_and_start_anew(run):
    assert asked(run, 1, 600.0, {"CPU": 1.0})


@pytest.mark.parametrize(
    ("workers", "eta", "each", "polls"),
    [
        pytest.param(2, 600.0, {"CPU": 1.0}, 5, id="as many as it may have"),
        pytest.param(1, 10.0, {"CPU": 1.0}, 5, id="about to end"),
        pytest.param(1, 600.0, {"CPU": 100.0}, 5, id="no box has the cores"),
        pytest.param(1, 600.0, {"CPU": 1.0, "GPU": 1.0}, 5, id="no box has a card"),
        pytest.param(1, 600.0, {"CPU": 1.0}, ROOM_POLLS - 1, id="free for a moment"),
    ],
)
def test_a_run_is_left_alone_where_a_restart_would_bring_nothing(run, workers, eta, each, polls):
    assert not asked(run, workers, eta, each, polls)


def test_a_restart_that_brought_no_worker_is_not_tried_again(run):
    growth, log = Growth(run, {"CPU": 1.0}), EventLog(run.run_dir)
    for attempt, expected in (1, True), (2, False):
        tail = EventTail(run.run_dir, skip=True)
        with growth.watching():  # takes the flag away
            log.write("start", workers=1)
            log.write("step", step=attempt, eta_seconds=600.0)
            for _ in range(ROOM_POLLS + 2):
                growth._look(tail)
            assert Path(growth.flag).exists() == expected
