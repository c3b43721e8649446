"""Compiled layers (model.compile) and Liger's kernels (model.use_liger_kernel) on a true shape: on and off.

The weights and the data are random: only their sizes matter.
"""

import time
from dataclasses import replace

import torch
from torch import nn
from torch._dynamo.utils import counters

from jobs.gpu.check import Check, Figures, Needs, expect
from jobs.gpu.shapes import TILES, TOKENS, TRAINED, random_batch, random_model
from jobs.gpu.timing import timed
from smolray.config import ModelConfig
from smolray.data.batch import Batch
from smolray.model.forward import hidden_states
from smolray.model.kernels import use_kernels
from smolray.model.load import base_model
from smolray.objectives.base import Normalisers
from smolray.objectives.sft import sft

LENGTHS = (1200, 1500, 1999)  # after the first one
MOST_GRAPHS = 25  # as on a CPU (tests/recipes/test_compile.py)


def passes(model: nn.Module, batch: Batch) -> list[float]:
    """The loss, and the norms of the gradients of the tower and of the text model, of a forward and backward pass."""
    model.zero_grad(set_to_none=True)
    hidden = hidden_states(model, batch, batch.target_positions)
    loss, _ = sft(base_model(model).lm_head, hidden, batch, Normalisers(1, len(batch.target_ids)))
    loss.backward()
    inner = base_model(model).model
    gradients = (
        [p.grad for p in part.parameters() if p.grad is not None] for part in (inner.vision_model, inner.text_model)
    )
    return [float(loss.detach()), *(float(nn.utils.get_total_norm(each)) for each in gradients)]


def on_and_off(settings: ModelConfig, device: torch.device) -> Figures:
    """Milliseconds and bytes of a pass through 256M with the kernels and without them, and how far apart losses are.

    The first pass with them, which compiles, is timed by itself.
    """
    model = random_model("random-256m", torch.bfloat16, device).train()
    batch = random_batch(model, 3, TOKENS, TILES, TRAINED, flat=True).to(device)
    alone = random_batch(model, 3, 300, 1, TRAINED, flat=True).to(device)
    figures, found = {}, {}
    for name in ("off", "on"):
        if name == "on":
            use_kernels(model, settings)
        began = time.perf_counter()
        found[name] = passes(model, batch)
        found[name] += passes(model, alone)  # a single tile is compiled by itself
        figures[f"{name}_first_seconds"] = round(time.perf_counter() - began, 2)
        torch.cuda.reset_peak_memory_stats(device)
        figures[f"{name}_ms"] = round(timed(lambda: passes(model, batch), device) * 1000, 2)
        figures[f"{name}_mib"] = round(torch.cuda.max_memory_allocated(device) / 2**20)

    far = max(abs(one - other) / abs(other) for one, other in zip(found["on"], found["off"], strict=True))
    figures["difference"] = far
    expect(far < 3e-2, f"losses or gradients differ by {far:.1e}, more than bf16 rounds", figures)
    if settings.compile:
        for tokens in LENGTHS:
            passes(model, random_batch(model, 3, tokens, 2, TRAINED, flat=True).to(device))
        graphs = figures["graphs"] = counters["stats"]["unique_graphs"]
        expect(graphs <= MOST_GRAPHS, f"{graphs} graphs for {1 + len(LENGTHS)} lengths", figures)
    return figures


def compiled(device: torch.device) -> Figures:
    """model.compile."""
    return on_and_off(ModelConfig(compile=True), device)


def liger(device: torch.device) -> Figures:
    """model.use_liger_kernel."""
    return on_and_off(ModelConfig(use_liger_kernel=True), device)


NEEDS = Needs(capability=(8, 0), memory_gib=11, bf16=True)
CHECKS = (
    Check("compile", "What do compiled layers save, and do lengths share them?", compiled, NEEDS),
    Check("liger", "What do Liger's kernels save?", liger, replace(NEEDS, packages=("liger_kernel",))),
)
