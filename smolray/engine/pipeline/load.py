"""The model of one stage: read slice by slice from safetensors, everything else on the meta device.

In: the run, inside an initialised process group. Out: a model ready for training, of which this stage's parameters are
real. With LoRA or quantised weights the whole model is read into CPU memory first and the rest dropped: adapters must
begin as they do in one process.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from smolray.config import ModelConfig, RunConfig
from smolray.engine.pipeline.mesh import Mesh
from smolray.engine.pipeline.parameters import Slot, slots_of
from smolray.engine.pipeline.split import split_of
from smolray.model import attention
from smolray.model.adapters import prepare_for_training
from smolray.model.load import load_model
from smolray.model.parts import frozen_front, leave_out
from smolray.pretrained import DTYPES, resolve, tensor_files


def load_stage(config: RunConfig, order: Sequence[int] | None = None) -> nn.Module:
    """The model with the weights of this worker's stage; `order`: see Mesh.

    Raises ConfigError where stages and workers do not fit.
    """
    whole = config.lora is not None
    model = prepare_for_training(load_model(config.model) if whole else empty_model(config.model), config)
    if config.model.vision_features == "precompute":
        leave_out(model, frozen_front(config))
    split = split_of(model, config, dist.get_world_size())
    stage, slots = Mesh.of(split.stages, order).place(dist.get_rank())[1], slots_of(model, split)
    if whole:
        for slot in slots:
            if stage not in slot.stages and slot.plain:
                slot.drop()
    else:
        fill([slot for slot in slots if stage in slot.stages], config.model)
    return model


def empty_model(model: ModelConfig) -> PreTrainedModel:
    """The model of `load_model` without weights: parameters on the meta device, tied as they will be."""
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


def fill(slots: list[Slot], model: ModelConfig) -> None:
    """Read the tensors of `slots` and no others; a folder whose tensors have other names than the model's is read whole
    first.
    """
    files = tensor_files(model)
    if any(slot.name not in files for slot in slots):
        named = dict(load_model(model).named_parameters())
        for slot in slots:
            slot.put(named[slot.name].detach().clone())
        return
    for file in {files[slot.name] for slot in slots}:
        with safe_open(file, framework="pt") as tensors:
            for slot in (s for s in slots if files[s.name] == file):
                slot.put(tensors.get_tensor(slot.name).to(DTYPES[model.dtype]))
