"""Who leaves the queue, and whose entry stays."""

import pytest

from smolray.config import load_config
from smolray.launch import queue as launch_queue
from smolray.launch.session import ClusterLostError
from smolray.run.lease import LeaseLostError
from smolray.run.queue import enter, read_queue


@pytest.mark.parametrize(
    ("error", "stays"),
    [(None, False), (ValueError("a fault"), False), (ClusterLostError("gone"), True), (LeaseLostError("taken"), True)],
    ids=["finished", "failed", "its Ray is lost", "another driver has it"],
)
def test_an_entry_stays_for_who_submits_the_run_again_or_took_it_over(tmp_path, monkeypatch, error, stays):
    config = load_config(None, ["name=mine", f"storage={tmp_path}", "resources.queue=true"])
    # its turn comes at once: no cluster is asked
    monkeypatch.setattr(launch_queue, "wait_for_turn", lambda config: enter(config.storage, config.name, "ann", 0, 1))
    try:
        with launch_queue.queued(config):
            if error:
                raise error
    except Exception as raised:
        assert raised is error
    assert [entry.run for entry in read_queue(str(tmp_path))] == (["mine"] if stays else [])
