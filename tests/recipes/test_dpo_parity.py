"""DPO gives the same losses, rewards and margins whatever runs it: 1 or 2 workers, ZeRO 0 to 3, adapter or frozen copy,
packed or not.
"""

import pytest

from tests.gloo import run_workers
from tests.recipes.curves import step_metrics

STEPS = 8
LORA = ["lora={r: 4}", "model.train=[]", "optimizer.learning_rate=1e-2"]
MIXED = ["dpo.loss_type=[sigmoid,sft]", "dpo.loss_weights=[0.7,0.3]"]
REFERENCE = {
    "full": MIXED,  # a frozen copy
    "lora": [*LORA, *MIXED],  # the adapter switched off
    "gradient checkpointing": [*LORA, *MIXED, "model.gradient_checkpointing=true"],
}
TWO = {
    ("full", "ZeRO-0"): [*MIXED, "engine.stage=0"],
    ("full", "ZeRO-2"): [*MIXED, "engine.stage=2"],
    ("lora", "ZeRO-3"): [*LORA, *MIXED, "engine.stage=3"],
}
MORE = {
    ("lora", "ZeRO-2"): [*LORA, *MIXED, "engine.stage=2"],
    ("gradient checkpointing", "ZeRO-3"): [*LORA, *MIXED, "engine.stage=3", "model.gradient_checkpointing=true"],
}


def assert_same(got, want, tolerance=1e-5):
    assert len(got) == len(want) == STEPS
    for step, (a, b) in enumerate(zip(got, want, strict=True)):
        for name in b:
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=tolerance), f"step {step}: {name}"


@pytest.fixture(scope="module")
def alone(pairs):
    shards, overrides = pairs
    jobs = {**REFERENCE, "full, packing by image": [*MIXED, "data.packing=image"]}
    return run_workers(
        step_metrics, 1, shards, {name: [*overrides, *settings] for name, settings in jobs.items()}, STEPS
    )


def on_two(pairs, engines):
    shards, overrides = pairs
    jobs = {name: [*overrides, *settings] for name, settings in engines.items()}
    found = run_workers(step_metrics, 2, shards, {" ".join(name): job for name, job in jobs.items()}, STEPS)
    return {name: found[" ".join(name)] for name in jobs}


@pytest.fixture(scope="module")
def two(pairs):
    return on_two(pairs, TWO)


@pytest.mark.parametrize(("method", "engine"), TWO)
def test_two_workers_give_the_metrics_of_one(alone, two, method, engine):
    """Three micro-batches a step: one worker has two of them, the other one."""
    assert_same(two[method, engine], alone[method])


@pytest.mark.slow
def test_more_of_two_workers_give_the_metrics_of_one(alone, pairs):
    for (method, _), got in on_two(pairs, MORE).items():
        assert_same(got, alone[method])


def test_rows_of_their_own_give_the_metrics_of_groups_that_lie_end_to_end(alone):
    assert_same(alone["full, packing by image"], alone["full"])


def test_the_chosen_answers_gain_on_the_rejected(alone):
    for name in REFERENCE:
        first, last = alone[name][0], alone[name][-1]
        assert first["rewards/margins"] == 0.0 and last["rewards/margins"] > 0.01 and last["rewards/accuracies"] > 0.6
        assert last["loss"] < first["loss"]
