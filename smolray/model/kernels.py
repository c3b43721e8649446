"""Faster kernels for a model: torch.compile of its layers (model.compile), Liger's (model.use_liger_kernel).

In: a model that is ready for training, and its settings. Out: the same model with the same weights, changed in place.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from smolray.config import ConfigError, ModelConfig
from smolray.model.load import base_model

torch._dynamo.config.specialize_float = True  # epsilons and scales are constants, whatever the lengths


def use_kernels(model: nn.Module, config: ModelConfig) -> nn.Module:
    """The model with the kernels that its settings ask for. What Inductor fuses in the layers Liger leaves alone."""
    if config.use_liger_kernel:
        from smolray.model.liger import use_liger  # its package need not be there

        use_liger(model, layers=not config.compile)
    if config.compile:
        compile_layers(model)
    return model


def compile_layers(model: nn.Module) -> None:
    """torch.compile of every layer of the vision tower and of the text model, on its first call.

    Layers of a kind share their graphs, and so do all lengths: attention, which differs by the layout, is left out
    (model/attention.py). The last text layer is compiled in its parts, as forward.py calls them. Parts that the model
    was loaded without have no layers.
    """
    inner = base_model(model).model
    tower, text = getattr(inner.vision_model, "encoder", None), getattr(inner.text_model, "layers", ())
    last = [part for layer in text[-1:] for part in layer.children()]
    for module in [*(tower.layers if tower is not None else ()), *text, *last]:
        module.compile(dynamic=True)
    if tower is not None:
        tower.register_forward_pre_hook(_contiguous, with_kwargs=True)


def _contiguous(
    tower: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The tower's input in the order of its dimensions.

    The patch embeddings leave it transposed. From that Inductor (torch 2.13, on a CPU) makes a wrong backward pass for
    a single tile: gradients of the tower's adapters were off by a fifth.
    """
    return args, named | {"inputs_embeds": named["inputs_embeds"].contiguous()}


def check_kernels(config: ModelConfig, device: torch.device) -> None:
    """Raise ConfigError where this worker cannot run the kernels that the settings ask for."""
    if not config.use_liger_kernel:
        return
    if device.type != "cuda":
        raise ConfigError(
            "model.use_liger_kernel = true needs a CUDA device for Triton's kernels, this worker has none; "
            "nearest: model.use_liger_kernel=false"
        )
    if find_spec("liger_kernel") is None:
        raise ConfigError(
            "model.use_liger_kernel = true needs the package liger-kernel, which is not installed here: "
            "pip install 'smolray[liger]'"
        )
