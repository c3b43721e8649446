"""Optimizers other than AdamW train through Ray, and a stopped run goes on as if it had not been stopped."""

import pytest

from smolray.launch.driver import launch_run
from smolray.run.status import request_stop
from tests.cluster.test_train import assert_every_sample_once, assert_same_curve, losses, when_step


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rate"), [("muon", 1e-3), ("lion", 2e-4), ("adafactor", 1e-3)])
def test_a_stopped_run_resumes_on_one_worker_with_the_curve_of_two(make_run, name, rate):
    settings = (f"optimizer.name={name}", f"optimizer.learning_rate={rate}", "engine.stage=0")
    whole = make_run(f"{name}-whole", *settings)
    assert launch_run(whole)["status"] == "finished"
    curve = losses(whole)
    assert curve[max(curve)] < 0.7 * curve[1]

    stopped = make_run(f"{name}-stopped", *settings)
    thread = when_step(stopped, 5, lambda: request_stop(stopped.run_dir))
    assert launch_run(stopped)["status"] == "stopped"
    thread.join(timeout=5)
    assert max(losses(stopped)) < max(curve)
    alone = make_run(f"{name}-stopped", *settings, "resources.num_workers=1")
    assert launch_run(alone)["status"] == "finished"
    assert_same_curve(alone, curve)
    assert_every_sample_once(alone)
