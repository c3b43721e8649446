"""What `make gpu` measured of a GPU replaces the planner's estimates of that kind of GPU."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from jobs.gpu.__main__ import summary
from jobs.gpu.check import Machine, Outcome
from jobs.gpu.shapes import step_figures
from smolray.cli.app import app
from smolray.planner import assumptions as a
from smolray.planner.calibration import calibrated
from smolray.planner.gpus import KNOWN_GPUS
from smolray.planner.inventory import InventoryError, parse
from smolray.planner.memory import Zero
from tests.unit.planner.test_plan import plan_of, work_of

MIB = 2**20
SPEEDS = {"tflops_float16": 60.0, "tflops_bfloat16": 58.0, "tflops_float32": 30.0, "copy_gb_a_second": 800.0}


def report(steps=((1.5, 9000, 10350, Zero(0, 1)),), name="NVIDIA GeForce RTX 3090", context=612, speeds=SPEEDS):
    """What `make gpu` writes: steps of (seconds over those planned, MiB allocated, MiB reserved, strategy)."""
    work, gpu = work_of(), replace(KNOWN_GPUS["rtx3090"], measured=True)
    outcomes = [
        Outcome("machine", "context", "?", "passed", figures={"context_mib": context}),
        Outcome("machine", "arithmetic", "?", "passed", figures=dict(speeds)),
        Outcome("two GPUs", "nccl", "?", "skipped", "2 GPUs are needed, found 1"),
    ]
    for slower, allocated, reserved, zero in steps:
        planned = step_figures(1.0, (allocated * MIB, reserved * MIB, 0), work, zero, gpu)["planned_seconds"]
        figures = step_figures(slower * planned, (allocated * MIB, reserved * MIB, 0), work, zero, gpu)
        outcomes.append(Outcome("step", "256m", "?", "passed", figures=figures))
    return summary(Machine(1, name, (8, 6), 24.0, True), outcomes, 99.0)


@pytest.fixture
def file(tmp_path):
    def write(**changes):
        (tmp_path / "gpu.json").write_text(json.dumps(report(**changes)))
        return tmp_path / "gpu.json"

    return write


def test_what_was_measured_replaces_the_estimates_of_that_kind_alone(file):
    found = calibrated(parse("2x rtx3090, 1x rtx4090"), file())
    measured, other = found.nodes[0].gpus[0], found.nodes[1].gpus[0]
    assert (measured.tflops_16, measured.tflops_32, measured.bandwidth) == (58.0, 30.0, 800e9)
    assert measured.context == 612 * MIB and measured.measured
    assert measured.fragmentation == pytest.approx(0.15, abs=1e-3)
    assert measured.slowdown == pytest.approx(1.5, rel=1e-3)
    assert other == KNOWN_GPUS["rtx4090"] and found.nodes[0].gpus[1] == measured


def test_a_plan_counts_what_was_measured(file):
    plain, slow = parse("1x rtx3090"), (2.0, 9000, 9000 * 1.3, Zero(0, 1))
    fixed = ("train.per_device_train_batch_size=1", "engine.stage=1")
    before, after = (
        plan_of(calibrated(plain, file(steps=steps)), "random-256m", *fixed).as_written for steps in ((), (slow,))
    )
    used = before.memory[0].tensors
    assert after.memory[0].tensors == pytest.approx(used)
    more = after.memory[0].workspace - before.memory[0].workspace
    assert more == pytest.approx((0.3 - a.FRAGMENTATION) * used, rel=0.01)
    assert after.time.compute == pytest.approx(2 * before.time.compute, rel=0.01)


def test_offloaded_and_missing_steps_leave_the_estimates(file):
    offloaded = (9.0, 9000, 18000, Zero(1, 1, offload_optimizer=True))
    for steps in ((), (offloaded,)):
        gpu = calibrated(parse("rtx3090"), file(steps=steps)).gpus[0]
        assert (gpu.fragmentation, gpu.slowdown) == (a.FRAGMENTATION, 1.0)


@pytest.mark.parametrize(
    ("changes", "inventory", "message"),
    [
        ({}, "rtx4090", r"measured on NVIDIA GeForce RTX 3090; the inventory has rtx4090"),
        ({"speeds": {}}, "rtx3090", r"holds no tflops_float16.*run `make gpu`"),
    ],
)
def test_figures_of_another_gpu_or_of_none_are_refused(file, changes, inventory, message):
    with pytest.raises(InventoryError, match=message):
        calibrated(parse(inventory), file(**changes))


@pytest.mark.parametrize("text", ["[]", "{", '{"machine": {}}', '{"machine": {"name": "x"}, "checks": 1}', None])
def test_another_file_is_refused_in_one_message(tmp_path, text):
    path = tmp_path / "gpu.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InventoryError, match=r"expected the gpu\.json of `make gpu`"):
        calibrated(parse("rtx3090"), path)


def test_the_command_takes_the_file(file):
    command = ["plan", "model.path=random-256m", "train.global_batch=8", "--inventory", "rtx3090"]
    fast = CliRunner().invoke(app, command)
    slow = CliRunner().invoke(app, [*command, "--calibration", str(file(steps=((9.0, 9000, 9450, Zero(0, 1)),)))])
    assert slow.exit_code == fast.exit_code == 0
    assert slow.output != fast.output
