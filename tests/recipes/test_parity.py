"""The same loss curve whatever runs it: 1, 2 or 3 workers, accumulation, ZeRO 0 to 3, packed or not, resumed anywhere."""

import pytest

from tests.gloo import run_workers
from tests.recipes.curves import curve

STEPS = 20


@pytest.fixture(scope="module")
def reference(recipe):
    """One worker, stage 0."""
    return run_workers(curve, 1, *recipe, STEPS)


def assert_same(got, want, loss=1e-5, gradient=1e-5):
    assert len(got) == len(want)
    for step, ((a, x), (b, y)) in enumerate(zip(got, want, strict=True)):
        assert abs(a - b) <= loss, f"step {step}: loss {a} against {b}"
        assert abs(x - y) <= gradient * max(y, 1.0), f"step {step}: gradient norm {x} against {y}"


def test_the_reference_curve_learns(reference):
    assert reference[-1][0] < 0.5 * reference[0][0]


@pytest.mark.parametrize(("workers", "stage"), [(2, 0), (1, 1), (2, 1), (2, 2), (2, 3)])
def test_stages_and_workers_give_the_same_curve(recipe, reference, workers, stage):
    shards, overrides = recipe
    assert_same(run_workers(curve, workers, shards, [*overrides, f"engine.stage={stage}"], STEPS), reference)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_three_workers_give_the_same_curve(recipe, reference, stage):
    shards, overrides = recipe
    assert_same(run_workers(curve, 3, shards, [*overrides, f"engine.stage={stage}"], STEPS), reference)


def test_packed_and_separate_give_the_same_curve(recipe, reference):
    """The same micro-batches, with and without sharing the tokens of an image: only the arithmetic differs."""
    shards, overrides = recipe
    assert_same(run_workers(curve, 1, shards, overrides, STEPS, "", False, True), reference)


@pytest.mark.parametrize(
    ("first", "then"),
    [(["engine.stage=2"], ["engine.stage=3"]), (["engine.stage=3"], ["engine.stage=0"]), (["engine.stage=0"], ["engine.stage=1"])],
    ids=lambda o: o[0].removeprefix("engine."),
)
def test_a_run_resumed_under_another_stage_and_world_goes_on_as_if_nothing_had_been(recipe, reference, tmp_path, first, then):
    shards, overrides = recipe
    run_dir, half = str(tmp_path / "run"), STEPS // 2
    before = run_workers(curve, 2, shards, [*overrides, *first], half, run_dir)
    after = run_workers(curve, 1 if then == ["engine.stage=0"] else 2, shards, [*overrides, *then], STEPS, run_dir, True)
    assert_same([*before, *after], reference)


@pytest.mark.slow
def test_a_checkpoint_of_two_workers_resumes_on_three_where_nothing_divides(recipe, reference, tmp_path):
    shards, overrides = recipe
    run_dir, half = str(tmp_path / "run"), STEPS // 2
    before = run_workers(curve, 2, shards, [*overrides, "engine.stage=2"], half, run_dir)
    after = run_workers(curve, 3, shards, [*overrides, "engine.stage=3"], STEPS, run_dir, True)
    assert_same([*before, *after], reference)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(
    "method",
    [["lora={r: 4, lora_dropout: 0.1}", "model.train=[]"], ["model.train=[text]"], ["model.gradient_checkpointing=true"]],
    ids=["lora", "frozen_vision", "gradient_checkpointing"],
)
def test_methods_give_the_same_curve_on_two_workers(recipe, method, stage):
    """Dropout included: it is keyed by the micro-batch, not by the worker."""
    shards, overrides = recipe
    alone = run_workers(curve, 1, shards, [*overrides, *method], 8)
    assert_same(run_workers(curve, 2, shards, [*overrides, *method, f"engine.stage={stage}"], 8), alone)


def test_bf16_follows_fp32(recipe, reference):
    shards, overrides = recipe
    got = run_workers(curve, 2, shards, [*overrides, "model.dtype=bfloat16", "engine.stage=2"], 8)
    assert [loss for loss, _ in got] == pytest.approx([loss for loss, _ in reference[:8]], rel=5e-2)
