"""Layers that Inductor compiles (model.compile) give the losses and gradients of the same layers uncompiled, also under
ZeRO: on a CPU, where it needs g++.
"""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from jobs.gpu.shapes import random_batch
from smolray.config import load_config
from smolray.model.adapters import prepare_for_training
from smolray.model.forward import hidden_states
from smolray.model.kernels import use_kernels
from smolray.model.load import base_model, load_model
from smolray.objectives.base import Normalisers
from smolray.objectives.sft import sft
from tests.gloo import run_workers
from tests.recipes.curves import curves

pytestmark = pytest.mark.slow
KINDS = {
    "full": ["model.gradient_checkpointing=1"],
    "lora": ["lora={r: 4, groups: [vision, text]}", "model.train=[]", "model.load_in_4bit=true"],
}
BATCHES = [(3, 200, 2), (2, 150, 1), (3, 260, 3), (4, 301, 2)]  # groups, tokens, tiles: one alone is a case of its own
TRAINED = 12  # tokens
MOST_GRAPHS = 25  # forward; backward are as many


def passes(model: nn.Module) -> list[float]:
    """The loss of each batch, and the norm of its gradient."""
    found = []
    for groups, tokens, tiles in BATCHES:
        batch = random_batch(model, groups, tokens, tiles, TRAINED, flat=True)
        hidden = hidden_states(model, batch, batch.target_positions)
        loss, _ = sft(base_model(model).lm_head, hidden, batch, Normalisers(groups, TRAINED))
        model.zero_grad()
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found += [float(loss.detach()), float(torch.nn.utils.get_total_norm(gradients))]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_layers_train_as_they_do_uncompiled(tiny_path, kind):
    config = load_config(None, [f"model.path={tiny_path}", "model.dtype=float32", "model.compile=true", *KINDS[kind]])
    torch.manual_seed(0)
    model = prepare_for_training(load_model(config.model), config)
    plain = passes(model)
    torch._dynamo.reset()
    counters.clear()
    compiled = passes(use_kernels(model, config.model))
    graphs = counters["stats"]["unique_graphs"]
    print(f"{kind}: {graphs} graphs, {plain}, {compiled}")
    assert compiled == pytest.approx(plain, rel=1e-5)
    assert 0 < graphs <= MOST_GRAPHS, "batches of different lengths share them"


def test_a_run_with_compiled_layers_has_the_curve_of_one_without(recipe):
    shards, overrides = recipe
    jobs = {name: ([*overrides, "engine.stage=2", f"model.compile={name}"], 2) for name in ("false", "true")}
    found = run_workers(curves, 1, shards, jobs)
    print(found)
    assert len(found["true"]) == 2
    for compiled, plain in zip(found["true"], found["false"], strict=True):
        assert compiled == pytest.approx(plain, rel=1e-5)


def test_dropout_of_a_compiled_layer_is_the_same_with_and_without_gradients():
    """A contrastive step runs each micro-batch twice, first without gradients (objectives/contrastive.py)."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Dropout(0.3), nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, 8))
    layer.compile(dynamic=True)
    for rows in (5, 1):
        values, passes = torch.randn(rows, 7, 8, requires_grad=True), []
        for gradients in (False, True, True):
            torch.manual_seed(3)
            with torch.set_grad_enabled(gradients):
                passes.append(layer(values).detach())
        assert torch.equal(passes[0], passes[1]) and torch.equal(passes[1], passes[2])
        torch.manual_seed(4)
        assert not torch.equal(layer(values).detach(), passes[0])
