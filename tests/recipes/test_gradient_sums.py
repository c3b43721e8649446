"""In 16 bit the gradients of a step's 32 micro-batches are added in fp32: their sum has the error of one rounding."""

import pytest
import torch
import torch.distributed as dist

from smolray.config import load_config
from smolray.data.local import local_plan
from smolray.engine.base import micro_batch_seed
from smolray.model.adapters import prepare_for_training
from smolray.model.forward import hidden_states
from smolray.model.load import base_model, load_model
from smolray.objectives.registry import objective_of
from smolray.run.state import canonical_name
from smolray.train.loop import normalisers_of
from tests.gloo import build_engine, run_workers
from tests.recipes.curves import stream_of

MICRO_BATCHES = 32


def exact_sum(config, batches, normalisers):
    """The gradients of each micro-batch, as the engine computes them, added in fp64: by name."""
    torch.manual_seed(0)
    model, objective = prepare_for_training(load_model(config.model), config), objective_of(config)
    sums = {canonical_name(name): 0.0 for name, p in model.named_parameters() if p.requires_grad}
    for batch in batches:
        torch.manual_seed(micro_batch_seed(config.seed, 0, batch.meta["number"]))
        hidden = hidden_states(model, batch, objective.positions(batch))
        objective.loss(base_model(model).lm_head, hidden, batch, normalisers)[0].backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                sums[canonical_name(name)] += p.grad.double()
                p.grad = None
    return sums


def errors(shards, overrides, stages):
    """By stage, |sum - exact sum| / |exact sum| over all gradients of a step; Adam's first moment tells the sum."""
    config = load_config(None, [*overrides, "optimizer.max_grad_norm=0"])
    plan = local_plan(shards, config)
    batches = list(stream_of(shards, config)(plan, range(MICRO_BATCHES)))
    normalisers = normalisers_of(plan, range(MICRO_BATCHES))
    exact = exact_sum(config, batches, normalisers)

    found = {}
    for stage in stages:
        engine = build_engine(config.replace({"engine.stage": stage}))
        own = batches[dist.get_rank() :: dist.get_world_size()]
        engine.accumulate(iter(own), len(own), normalisers)
        engine.step(0.0)
        first = engine.state().exp_avg
        difference = sum(
            (first[name].double() / (1 - config.optimizer.adam_beta1) - exact[name]).square().sum() for name in exact
        )
        found[stage] = float((difference / sum(each.square().sum() for each in exact.values())).sqrt())
    return found


@pytest.fixture(scope="module")
def in_bf16(recipe):
    shards, overrides = recipe
    small = ["model.dtype=bfloat16", "train.per_device_train_batch_size=2", "train.global_batch=32"]
    return shards, [*overrides, *small]


@pytest.fixture(scope="module")
def alone(in_bf16):
    return run_workers(errors, 1, *in_bf16, [0, 1, 2, 3])


@pytest.mark.parametrize(("stage", "limit"), [(0, 1e-4), (1, 2.5e-3), (2, 2.5e-3), (3, 2.5e-3)])
def test_the_sum_of_32_micro_batches_has_the_error_of_one_rounding(alone, stage, limit):
    """At stage 0 alone it is not rounded at all."""
    assert alone[str(stage)] < limit


@pytest.mark.slow
def test_two_workers_round_their_sums_once_and_add_them(in_bf16):
    found = run_workers(errors, 2, *in_bf16, [0, 2, 3])
    assert max(found.values()) < 4e-3
