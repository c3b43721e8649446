"""The model of one stage: its tensors are read from safetensors, all others stay on the meta device.

In: the run, inside an initialised process group. Out: a model ready for training whose parameters of this stage are
real. With LoRA (which quantised weights need) the whole model is read into CPU memory first and the rest is dropped:
adapters must start as they do in one process.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from smolray.config import ModelConfig, RunConfig
from smolray.engine.pipeline.mesh import Mesh
from smolray.engine.pipeline.parameters import ParameterPlacement, placements_of
from smolray.engine.pipeline.split import split_of
from smolray.model import attention
from smolray.model.adapters import prepare_for_training
from smolray.model.load import load_model
from smolray.model.parts import drop_submodules, frozen_prefix
from smolray.pretrained import DTYPES, resolve, tensor_files


def load_stage(config: RunConfig, order: Sequence[int] | None = None) -> nn.Module:
    """The model with the weights of this worker's stage. `order`: see Mesh.

    Raises:
        ConfigError: stages, layers and workers do not fit each other.
    """
    whole = config.lora is not None
    model = prepare_for_training(load_model(config.model) if whole else empty_model(config.model), config)
    if config.model.vision_features == "precompute":
        drop_submodules(model, frozen_prefix(config))

    split = split_of(model, config, dist.get_world_size())
    _, stage = Mesh.of(split.stages, order).coordinates(dist.get_rank())
    placements = placements_of(model, split)
    if whole:
        for placement in placements:
            if stage not in placement.stages and placement.plain:
                placement.drop()
    else:
        fill([placement for placement in placements if stage in placement.stages], config.model)
    return model


def empty_model(model: ModelConfig) -> PreTrainedModel:
    """The model of `load_model` without weights: parameters on the meta device, tied as in the loaded model."""
    config = AutoConfig.from_pretrained(resolve(model.path), revision=model.revision, trust_remote_code=False)
    with torch.device("meta"):
        made = AutoModelForImageTextToText.from_config(
            config, dtype=DTYPES[model.dtype], attn_implementation=model.attn_implementation
        )

    text = made.model.text_model
    text.rotary_emb = type(text.rotary_emb)(config=text.config)  # its frequencies are computed, not read
    made.config.use_cache = False
    made.set_attn_implementation({"text_config": attention.NAME})
    return made


def fill(placements: list[ParameterPlacement], model: ModelConfig) -> None:
    """Read the tensors of `placements` and no others.

    A folder whose tensors have other names than the model's parameters is read whole.
    """
    files = tensor_files(model.path, model.revision)
    if any(placement.name not in files for placement in placements):
        named = dict(load_model(model).named_parameters())
        for placement in placements:
            placement.put(named[placement.name].detach().clone())
        return

    for file in {files[placement.name] for placement in placements}:
        with safe_open(file, framework="pt") as tensors:
            for placement in placements:
                if files[placement.name] == file:
                    placement.put(tensors.get_tensor(placement.name).to(DTYPES[model.dtype]))
