"""engine: trl trains as our engine does: the same losses and metrics on the same batches, on one worker and on two, SFT
and DPO.
"""

import pytest
import torch

from smolray.config import ConfigError, load_config
from smolray.data.local import local_plans
from smolray.model.adapters import prepare_for_training
from smolray.model.load import base_model, load_model
from smolray.run.checkpoint import Progress
from tests.gloo import run_workers
from tests.recipes.curves import step_metrics

STEPS = 10
LORA = ["lora={r: 4}", "model.train=[]", "optimizer.learning_rate=1e-2"]
# TRL knows no packing and takes as many samples in each micro-batch; two micro-batches a step.
ALIKE = ["data.max_questions_per_image=1", "train.global_batch=2", "image.upscale=true"]
SFT = {"stage 0": ["engine.stage=0"], "stage 2": ["engine.stage=2"], "stage 3 lora": ["engine.stage=3", *LORA]}
DPO = {"stage 2": ["engine.stage=2"], "stage 0 lora": ["engine.stage=0", *LORA]}


def by_trl(shards, overrides, steps):
    """The metrics of each step, the learning rates, and what of the state is to be seen: names and the largest
    difference from the model.
    """
    from smolray.train.trl import TrlRun

    config = load_config(None, ["engine.name=trl", *overrides, f"train.max_steps={steps}"])
    torch.manual_seed(0)
    model = prepare_for_training(load_model(config.model), config)
    moments = []
    run = TrlRun(config, model, None, local_plans(shards, config), shards, Progress(), [moments.append])
    progress = run.run()
    state = run.state()
    with run.gathered():
        weights = [p.numel() for p in base_model(run.model).parameters()]
    assert all(weights), "inside gathered() every worker holds whole weights"
    metrics = [{"loss": m.metrics.loss, "grad_norm": m.metrics.grad_norm} | m.metrics.metrics for m in moments]
    seen = {
        "samples": progress.samples,
        "tokens": progress.tokens,
        "step": progress.step,
        "last": moments[-1].last,
        "names": len(state.weights),
    }
    return metrics, seen, [m.metrics.label_tokens for m in moments]


def assert_same(got, want):
    assert len(got) == len(want) == STEPS
    for step, (a, b) in enumerate(zip(got, want, strict=True)):
        for name in b:
            assert a[name] == pytest.approx(b[name], abs=1e-4, rel=1e-4), f"step {step}: {name}"


@pytest.fixture(scope="module")
def ours(recipe, pairs):
    """Our engine alone, SFT and DPO, full and LoRA."""
    found = {}
    for method, (shards, overrides) in (("sft", recipe), ("dpo", pairs)):
        jobs = {name: [*overrides, *ALIKE, *settings] for name, settings in (("full", []), ("lora", LORA))}
        found[method] = run_workers(step_metrics, 1, shards, jobs, STEPS)
    return found


def check(ours, method, data, settings, workers):
    shards, overrides = data
    metrics, seen, _ = run_workers(by_trl, workers, shards, [*overrides, *ALIKE, *settings], STEPS)
    assert_same(metrics, ours[method]["lora" if LORA[0] in settings else "full"])
    assert (
        seen["samples"] == STEPS * 2 * 6
        and seen["step"] == STEPS
        and seen["last"]
        and seen["names"] > 0
        and seen["tokens"] > 0
    )


def test_sft_by_trl_gives_our_losses(ours, recipe):
    check(ours, "sft", recipe, SFT["stage 2"], workers=2)


def test_dpo_by_trl_gives_our_losses_and_rewards(ours, pairs):
    check(ours, "dpo", pairs, DPO["stage 2"], workers=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "name", "workers"),
    [
        ("sft", "stage 2", 1),
        ("sft", "stage 0", 2),
        ("sft", "stage 3 lora", 2),
        ("dpo", "stage 2", 1),
        ("dpo", "stage 0 lora", 2),
    ],
)
def test_other_stages_and_lora_by_trl(ours, recipe, pairs, method, name, workers):
    check(ours, method, *((recipe, SFT[name]) if method == "sft" else (pairs, DPO[name])), workers)


def test_what_trl_cannot_do_is_refused():
    with pytest.raises(ConfigError) as caught:
        load_config(
            None,
            [
                "engine=trl",
                "resources.num_workers=[1,2]",
                "train.global_batch=3",
                "train.audit=true",
                "image.max_tiles=5",
                "model.vision_features=precompute",
                "model.train=[text]",
                "method=dpo",
                "dpo.reference=precompute",
            ],
        )
    for key in (
        "resources.num_workers = [1, 2]",
        "train.global_batch = 3",
        "train.audit",
        "image.upscale",
        "image.max_tiles",
        "vision_features",
        "dpo.reference = precompute",
    ):
        assert f"{key}" in str(caught.value), key
    with pytest.raises(ConfigError, match="the model without its adapters"):
        load_config(None, ["engine=trl", "image.upscale=true", "method=dpo", "lora={r: 4}"])
