"""Log-probabilities of a reference model: the model that training began with.

In: the model being trained and a Batch of pairs. Out: (C,) float32, without gradients. With LoRA alone the reference is
the model with its adapters switched off, otherwise a frozen copy. Neither runs where the batches have the values from a
sidecar.
"""

import copy
from collections.abc import Callable

import torch
from torch import nn

from smolray.config import RunConfig
from smolray.data.batch import Batch
from smolray.model.forward import target_states
from smolray.model.kernels import compile_layers
from smolray.model.load import base_model
from smolray.objectives.base import completion_logps

Reference = Callable[[nn.Module, Batch], torch.Tensor]


def reference_of(model: nn.Module, config: RunConfig) -> Reference | None:
    """The function that runs the reference model. None where there is none, or where the batches have its values.

    Call it before training has changed `model`.
    """
    kind = config.reference_model
    if kind in ("none", "precompute"):
        return None
    if kind == "adapter":
        return _adapters_off
    frozen = copy.deepcopy(model).requires_grad_(False).eval()
    if config.model.compile:  # a copy of a compiled layer is not compiled
        compile_layers(frozen)
    return lambda _, batch: _logps(frozen, batch)


def _adapters_off(model: nn.Module, batch: Batch) -> torch.Tensor:
    with model.disable_adapter():  # type: ignore[operator]  # a PeftModel
        return _logps(model, batch)


@torch.no_grad()
def _logps(model: nn.Module, batch: Batch) -> torch.Tensor:
    return completion_logps(base_model(model).lm_head, target_states(model, batch), batch)
