"""Layers that Inductor compiles (model.compile) give the losses and gradients of the same layers uncompiled: on a CPU,
where it needs g++.
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

pytestmark = pytest.mark.slow
KINDS = {
    "full": ["model.gradient_checkpointing=1"],
    "lora": ["lora={r: 4, lora_dropout: 0.1, groups: [vision, text]}", "model.train=[]", "model.load_in_4bit=true"],
}
BATCHES = [(3, 200, 2), (2, 150, 1), (3, 260, 3), (4, 301, 2)]  # groups, tokens, tiles
TRAINED = 12  # tokens
MOST_GRAPHS = 25  # forward; backward are as many


def passes(model: nn.Module) -> list[float]:
    """The loss of each batch, and the norm of its gradient."""
    found = []
    for groups, tokens, tiles in BATCHES:
        batch = random_batch(model, groups, tokens, tiles, TRAINED, flat=True)
        torch.manual_seed(5)  # dropout's
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
