"""engine: auto on a real cluster: looked at, planned, trained; stopped, and resumed on fewer workers under another
plan; and a plan measured.
"""

import os
import signal

import pytest
import yaml
from rich.console import Console

from smolray import storage
from smolray.config import load_config
from smolray.launch.driver import launch_run
from smolray.launch.measure import measure_plan, measurement_table
from smolray.run.events import read_events
from smolray.run.status import request_stop, run_status
from tests.cluster.test_train import assert_every_sample_once, losses, train_workers, when_step

AUTO = ("engine.name=auto", "train.num_train_epochs=1")


def told(config, kind):
    return [e for e in read_events(config.run_dir) if e["event"] == kind]


@pytest.mark.slow
def test_a_run_is_planned_trained_stopped_and_resumed_on_fewer_workers(make_run):
    config = make_run("planned", *AUTO)
    thread = when_step(config, 3, lambda: request_stop(config.run_dir))
    assert launch_run(config)["status"] == "stopped"
    thread.join(timeout=5)
    (plan,), (start,), (inventory,) = told(config, "plan"), told(config, "start"), told(config, "inventory")
    assert (
        start["config"]["engine"]["name"] in ("zero", "pipeline")
        and start["workers"] == plan["settings"]["resources.num_workers"]
    )
    assert "Chosen: " in plan["words"] and any(row["fits"] for row in plan["strategies"])
    assert len(inventory["workers"]) == start["workers"] and all(w["tflops"] > 0 for w in inventory["workers"])
    assert "CPU" in run_status(config.run_dir).gpus
    stored = yaml.safe_load(storage.read_bytes(f"{config.run_dir}/config.yaml"))
    assert stored["engine"]["name"] == "auto", "it is planned again when it is resumed"
    assert stored["train"]["global_batch"] == plan["settings"]["train.global_batch"]

    assert launch_run(make_run("planned", *AUTO, "resources.num_workers=1"))["status"] == "finished"
    assert len(told(config, "plan")) == 2 and told(config, "start")[-1]["workers"] == 1
    sizes = {
        (e["config"]["train"]["global_batch"], e["config"]["train"]["per_device_train_batch_size"])
        for e in told(config, "start")
    }
    assert len(sizes) == 1, "the size of its steps is part of its position"
    assert_every_sample_once(load_config(f"{config.run_dir}/config.yaml").replace({"data.validation": ""}))
    curve = losses(config)
    assert curve[max(curve)] < curve[1]


@pytest.mark.slow
def test_a_plan_is_measured_and_compared_with_its_prediction(make_run):
    config = make_run("measured", "engine.name=auto")
    plan, measured = measure_plan(config)
    assert plan.chosen.fits and measured.seconds > 0 and measured.steps > 2
    assert len(measured.memory) == len(plan.chosen.gpus) and min(measured.memory) > 2**27
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(measurement_table(plan, measured))
    printed = console.export_text()
    assert f"{plan.chosen.time.total:.3g}" in printed and f"{measured.seconds:.3g}" in printed
    assert not storage.exists(config.run_dir + "/checkpoints"), "it writes nothing"


@pytest.mark.faults
def test_a_planned_run_is_planned_again_and_resumes_after_a_lost_worker(make_run):
    config, killed = make_run("planned-killed", *AUTO, "checkpoint.save_steps=2"), []

    def kill():
        victim = train_workers()[0]
        killed.append(victim.pid)
        os.kill(victim.pid, signal.SIGKILL)

    thread = when_step(config, 5, kill)
    result = launch_run(config)
    thread.join(timeout=5)
    assert killed and result["status"] == "finished"
    first, again = told(config, "plan")
    assert not first["after"] and again["after"]
    assert [e["attempt"] for e in told(config, "start")] == [1, 2]
    assert_every_sample_once(load_config(f"{config.run_dir}/config.yaml"))
