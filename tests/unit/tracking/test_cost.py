"""What trackers cost: they work in the driver, and training workers, which are other processes, know none of them."""

import statistics
import time

import psutil
import pytest

from smolray.tracking.feed import fed
from smolray.tracking.registry import tracker_consumers
from tests.tracked import IMAGES, add_events, step, tracked_run

TRACKERS = ["tensorboard", "wandb", "mlflow"]
STEPS, EVERY = 60, 1.0  # seconds
# CPU-seconds of a step of 16 conversations of the smallest model in jobs/README.md (30 M parameters)
SMALLEST_STEP, SHORT_RUN = 1.0, 1000


def cpu_seconds():
    """Of this process and of those that the trackers started."""
    me = psutil.Process()
    times = (p.cpu_times() for p in (me, *me.children(recursive=True)))
    return sum(t.user + t.system + t.children_user + t.children_system for t in times)


@pytest.mark.slow
def test_all_trackers_on_cost_a_run_of_1000_of_the_smallest_steps_less_than_2_percent(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config, costs, before = tracked_run(tmp_path), [], cpu_seconds()
    consumers, said = list(tracker_consumers(config, TRACKERS, lambda: IMAGES)), []
    with fed(config.run_dir, consumers, said.append, 60) as feeds:
        while len(said) < len(TRACKERS):  # they have loaded their libraries and sent what was there
            time.sleep(0.5)
        time.sleep(5)
        started, before = cpu_seconds() - before, cpu_seconds()
        for number in range(STEPS):
            add_events(config, step(5 + number))
            time.sleep(EVERY)
            if number % 10 == 9:
                now = cpu_seconds()
                costs.append((now - before) / 10)
                before = now
    assert all(feed.complete for feed in feeds), said
    with capsys.disabled():
        print(f"\nCPU-s to start: {started:.1f}; CPU-ms a step: {[round(1000 * cost) for cost in costs]}")
    assert started + SHORT_RUN * statistics.median(costs) < 0.02 * SHORT_RUN * SMALLEST_STEP
