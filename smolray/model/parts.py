"""The parts of a model, and a model without some of them.

They are those that are frozen in front of the trained ones, and what their stored weights are.

In: a RunConfig or ModelConfig. Out: names of groups, a hash of their weights, and a model that holds no memory for what
it does not run.
"""

import hashlib
from collections.abc import Collection, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from smolray.config import ConfigError, ModelConfig, ModelGroup, RunConfig
from smolray.model.load import base_model, group_of
from smolray.pretrained import tensor_files


def frozen_prefix(config: RunConfig) -> tuple[ModelGroup, ...]:
    """The model groups before anything trained, whose output never changes in a run.

    None, the vision tower, or the tower and the connector.
    """
    if "vision" in config.trained_groups:
        return ()
    return ("vision",) if "connector" in config.trained_groups else ("vision", "connector")


def drop_submodules(model: nn.Module, groups: Collection[ModelGroup]) -> nn.Module:
    """The model with empty modules in place of these groups; it is changed in place.

    forward.py recognises a group that was dropped by its empty module.
    """
    base: Any = base_model(model)
    if "vision" in groups:
        base.model.vision_model = nn.Module()
    if "connector" in groups:
        base.model.connector = nn.Module()
    if "text" in groups:
        base.model.text_model, base.lm_head = nn.Module(), nn.Module()
    return model


def weights_digest(model: ModelConfig, groups: Sequence[ModelGroup]) -> str:
    """A hash of the stored tensors of these groups. It does not depend on how they are distributed over files.

    Raises:
        ConfigError: there are no safetensors weights of these groups.
    """
    files = tensor_files(model.path, model.revision)
    names = sorted(name for name in files if group_of(name) in groups)
    if not names:
        raise ConfigError(f"model.path = {model.path} holds no safetensors weights of {', '.join(groups)}")

    opened = {file: safe_open(file, framework="pt") for file in {files[name] for name in names}}
    digest = hashlib.blake2b(digest_size=16)
    for name in names:
        tensor = opened[files[name]].get_tensor(name)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
