"""Every method has the same curve on one and two workers and under its ZeRO stages, continues it after a resume, and is
exported as it was trained.
"""

from functools import cache
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from smolray.config import load_config, to_yaml
from smolray.export import export_adapter, export_run, few_samples, logits
from smolray.model.trained import trained_model
from smolray.run import checkpoint
from tests.gloo import run_workers
from tests.recipes.curves import curves
from tests.recipes.methods import METHODS, STAGES, STEPS, after_zero3, resumed, saved, whole_parts

# Kin of the others, which hold the promise in `make test`.
SLOW = ("bf16", "8-bit", "4-bit-dora", "loftq", "paged-8-bit-adam", "bf16-8-bit-adam", "rates")
EACH = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in METHODS]

# Equal in fp32. Over 16-bit or quantised weights, and with 8-bit moments, a sum taken in another order is rounded to
# another value.
TOLERANCE = {
    "bf16": 5e-3,
    "4-bit": 5e-3,
    "8-bit": 5e-3,
    "paged-8-bit-adam": 5e-3,
    "8-bit-adam": 1e-4,
    "bf16-8-bit-adam": 5e-3,
}


def together(one_job):
    """`one_job(names)` answers for many methods in one start of the workers: for the quick ones, or for the slow."""
    found = cache(one_job)
    slow, quick = tuple(SLOW), tuple(name for name in METHODS if name not in SLOW)
    return lambda name: found(slow if name in SLOW else quick)


@pytest.fixture(scope="module")
def alone(recipe):
    """alone(method) -> its curve on one worker."""
    shards, overrides = recipe

    @together
    def found(names):
        return run_workers(curves, 1, shards, {name: ([*overrides, *METHODS[name]], STEPS) for name in names})

    return lambda name: found(name)[name]


def on_two_workers(recipe, stages_of):
    """on_two_workers(...)(method, stage) -> its curve."""
    shards, overrides = recipe

    @together
    def found(names):
        jobs = {
            f"{name}, stage {s}": ([*overrides, *METHODS[name], f"engine.stage={s}"], STEPS)
            for name in names
            for s in stages_of(name)
        }
        return run_workers(curves, 2, shards, jobs)

    return lambda name, stage: found(name)[f"{name}, stage {stage}"]


@pytest.fixture(scope="module")
def highest(recipe):
    """Under the highest stage of each method."""
    return on_two_workers(recipe, lambda name: STAGES[name][-1:])


@pytest.fixture(scope="module")
def lower(recipe):
    """Under the other stages."""
    return on_two_workers(recipe, lambda name: STAGES[name][:-1])


@pytest.fixture(scope="module")
def interrupted(recipe, tmp_path_factory):
    """interrupted(method) -> (run folder, the curve of two workers up to a save and of one from there on)."""
    shards, overrides = recipe
    root = tmp_path_factory.mktemp("runs")

    @together
    def found(names):
        first = run_workers(saved, 2, names, shards, overrides, str(root))
        for name in names:
            settings = [*overrides, *METHODS[name], f"storage={root}", f"name={name}", f"data.train={shards}"]
            (root / name / "config.yaml").write_text(to_yaml(load_config(None, settings)))
        then = run_workers(resumed, 1, names, shards, overrides, str(root))
        return {name: (str(root / name), [*first[name], *then[name]]) for name in names}

    return lambda name: found(name)[name]


def losses(curve):
    return [loss for loss, _ in curve]


def assert_same_curve(two, alone, method, stage):
    one = losses(alone(method))
    assert losses(two(method, stage)) == pytest.approx(one, abs=TOLERANCE.get(method, 1e-5))
    assert one[-1] < one[0], "it learns nothing: equal curves would show nothing"


@pytest.mark.parametrize("method", EACH)
def test_two_workers_give_the_curve_of_one(alone, highest, method):
    assert_same_curve(highest, alone, method, STAGES[method][-1])


@pytest.mark.slow
@pytest.mark.parametrize(("method", "stage"), [(name, stage) for name in METHODS for stage in STAGES[name][:-1]])
def test_lower_stages_give_the_curve_of_one_worker_too(alone, lower, method, stage):
    assert_same_curve(lower, alone, method, stage)


@pytest.mark.parametrize("method", EACH)
def test_a_run_saved_by_two_workers_resumes_on_one(alone, interrupted, method):
    _, curve = interrupted(method)
    assert losses(curve) == pytest.approx(losses(alone(method)), abs=TOLERANCE.get(method, 1e-5))


def test_an_engine_leaves_nothing_behind_for_the_next_in_its_process(recipe):
    fresh, after = run_workers(after_zero3, 1, *recipe)
    assert after == fresh


def test_8_bit_moments_are_saved_as_they_are(interrupted):
    state = checkpoint.load_state(checkpoint.latest(interrupted("8-bit-adam")[0]))
    assert state.codes and not state.codes.keys() & state.exp_avg.keys()
    assert state.codes.keys() | state.exp_avg.keys() == state.weights.keys()
    assert all(kept["state1"].dtype == torch.uint8 for kept in state.codes.values())


@pytest.mark.parametrize("method", EACH)
def test_each_method_is_exported_as_it_was_trained(interrupted, method):
    """export_run holds the logits against the trained model's before there is a folder."""
    folder = Path(export_run(interrupted(method)[0]))
    assert (folder / "model.safetensors").exists() and "differ" in (folder / "README.md").read_text()
    assert ("nats a token" in (folder / "README.md").read_text()) == (
        method in ("4-bit", "4-bit-dora", "8-bit", "loftq")
    )


@pytest.mark.parametrize("method", [each for each in EACH if each.values[0] in ("dora", "rslora", "bf16", "pissa")])
def test_the_adapter_folder_gives_the_same_logits_in_plain_peft(interrupted, method):
    run, _ = interrupted(method)
    folder = export_adapter(run)
    config = load_config(f"{run}/config.yaml")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= {p.name for p in Path(folder).iterdir()}
    base = AutoModelForImageTextToText.from_pretrained(config.model.path, dtype=getattr(torch, config.model.dtype))
    batch = few_samples(config)
    before = logits(base, batch)
    got, want = (
        logits(PeftModel.from_pretrained(base, folder), batch),
        logits(trained_model(config, checkpoint.latest(run)), batch),
    )
    scale = want.abs().max()
    assert (got - want).abs().max() <= 1e-5 * scale < (before - want).abs().max()


def test_a_frozen_vision_tower_is_not_sharded_by_zero_3(recipe):
    shards, overrides = recipe
    after_training, inside, after_evaluation = run_workers(
        whole_parts, 2, shards, [*overrides, "model.train=[connector, text]"]
    )
    assert after_training == after_evaluation == {"vision": True, "connector": False, "text": False}
    assert inside == {"vision": True, "connector": True, "text": True}
