"""The loss curve is the same with 1, 2 or 3 workers, accumulation, ZeRO 0 to 3, packed or not, resumed anywhere."""

import pytest
import torch
from safetensors.torch import load_file

from tests.gloo import run_workers
from tests.recipes.curves import curve, curves, first_gradients

STEPS, FEW = 20, 8
METHODS = {
    # dropout is keyed by the micro-batch, not by the worker
    "lora": ["lora={r: 4, lora_dropout: 0.1}", "model.train=[]"],
    "frozen_vision": ["model.train=[text]"],
    "gradient_checkpointing": ["model.gradient_checkpointing=true"],
}


def assert_same(got, want, loss=1e-5, gradient=1e-5):
    assert len(got) == len(want)
    for step, ((a, x), (b, y)) in enumerate(zip(got, want, strict=True)):
        assert abs(a - b) <= loss, f"step {step}: loss {a} against {b}"
        assert abs(x - y) <= gradient * max(y, 1.0), f"step {step}: gradient norm {x} against {y}"


@pytest.fixture(scope="module")
def alone(recipe):
    """Curves of one worker by name: the reference of every other test. (Starting processes costs more than training:
    one start for all.)
    """
    shards, overrides = recipe
    jobs = {
        "reference": (overrides, STEPS),
        "separate": (overrides, STEPS, True),
        "stage1": ([*overrides, "engine.stage=1"], STEPS),
    }
    return run_workers(
        curves, 1, shards, jobs | {name: ([*overrides, *method], FEW) for name, method in METHODS.items()}
    )


@pytest.fixture(scope="module")
def reference(alone):
    """One worker, stage 0."""
    return alone["reference"]


@pytest.fixture(scope="module")
def two(recipe):
    """Curves of two workers by name."""
    shards, overrides = recipe
    jobs = {f"stage{stage}": ([*overrides, f"engine.stage={stage}"], STEPS) for stage in range(4)}
    jobs |= {name: ([*overrides, *method, "engine.stage=3"], FEW) for name, method in METHODS.items()}
    return run_workers(
        curves, 2, shards, jobs | {"bf16": ([*overrides, "model.dtype=bfloat16", "engine.stage=2"], FEW)}
    )


def test_the_reference_curve_learns(reference):
    assert reference[-1][0] < 0.5 * reference[0][0]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_on_two_workers_gives_the_curve_of_one(two, reference, stage):
    assert_same(two[f"stage{stage}"], reference)


def test_zero_on_a_single_worker_gives_the_same_curve(alone, reference):
    assert_same(alone["stage1"], reference)


def test_gradients_are_the_same_on_one_worker_and_two_in_every_stage(recipe, tmp_path):
    """To 1e-5 of the global norm."""
    shards, overrides = recipe
    run_workers(first_gradients, 1, shards, {"alone": overrides}, str(tmp_path))
    run_workers(
        first_gradients, 2, shards, {f"stage{s}": [*overrides, f"engine.stage={s}"] for s in range(4)}, str(tmp_path)
    )
    alone = load_file(tmp_path / "alone.safetensors")
    norm = torch.cat([g.flatten() for g in alone.values()]).norm()
    for stage in range(4):
        got = load_file(tmp_path / f"stage{stage}.safetensors")
        assert got.keys() == alone.keys()
        worst = max((got[name] - alone[name]).norm() / norm for name in alone)
        assert worst <= 1e-5, f"stage {stage}: {worst}"


@pytest.mark.slow
def test_three_workers_give_the_same_curve(recipe, reference):
    shards, overrides = recipe
    three = run_workers(
        curves, 3, shards, {str(stage): ([*overrides, f"engine.stage={stage}"], STEPS) for stage in (0, 2, 3)}
    )
    for got in three.values():
        assert_same(got, reference)


def test_packed_and_separate_give_the_same_curve(alone, reference):
    """The same micro-batches, with and without sharing the tokens of an image: only the arithmetic differs."""
    assert_same(alone["separate"], reference)


@pytest.mark.parametrize("method", METHODS)
def test_methods_give_the_same_curve_on_two_workers(alone, two, method):
    assert_same(two[method], alone[method])


@pytest.mark.slow
def test_methods_give_the_same_curve_on_two_workers_under_zero_2(recipe, alone):
    shards, overrides = recipe
    jobs = {name: ([*overrides, *method, "engine.stage=2"], FEW) for name, method in METHODS.items()}
    for name, got in run_workers(curves, 2, shards, jobs).items():
        assert_same(got, alone[name])


def test_bf16_follows_fp32(two, reference):
    assert [loss for loss, _ in two["bf16"]] == pytest.approx([loss for loss, _ in reference[:FEW]], rel=5e-2)


@pytest.mark.parametrize(
    ("first", "then", "workers"),
    [
        (3, 0, 1),
        pytest.param(2, 3, 2, marks=pytest.mark.slow),
        pytest.param(0, 1, 2, marks=pytest.mark.slow),
        pytest.param(2, 3, 3, marks=pytest.mark.slow),
    ],
)
def test_resuming_with_another_stage_and_world_keeps_the_curve(recipe, reference, tmp_path, first, then, workers):
    """Three workers: nothing divides there."""
    shards, overrides = recipe
    run_dir, half = str(tmp_path / "run"), STEPS // 2
    before = run_workers(curve, 2, shards, [*overrides, f"engine.stage={first}"], half, run_dir)
    after = run_workers(curve, workers, shards, [*overrides, f"engine.stage={then}"], STEPS, run_dir, True)
    assert_same([*before, *after], reference)
