"""What the watcher of a run makes of the log that a lost or ended job leaves."""

import pytest

from smolray.cluster.resubmit import was_stopped

STEP, PREPARING = {"event": "step", "step": 1}, {"event": "preparing"}


def end(status):
    return {"event": "end", "status": status}


@pytest.mark.parametrize(
    ("fresh", "stopped"),
    [
        ([], True),
        ([STEP, end("stopped")], True),
        ([STEP, end("stopped"), PREPARING], True),
        ([STEP, end("finished")], False),
        ([STEP, end("failed")], False),
        ([STEP], False),
    ],
    ids=["before its first event", "stopped", "and begun again already", "finished", "failed", "no end"],
)
def test_a_run_that_was_stopped_to_move_is_followed_to_its_next_job(fresh, stopped):
    assert was_stopped(fresh) is stopped
