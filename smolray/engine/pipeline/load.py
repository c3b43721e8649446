"""The model of one stage: its tensors are read from safetensors, all others stay on the meta device.

In: the run, inside an initialised process group. Out: a model ready for training whose parameters of this stage are
real. With LoRA (which quantised weights need) the whole model is read into CPU memory first and the rest is dropped:
adapters must start as they do in one process.
"""

from collections.abc import Sequence

import torch.distributed as dist
from safetensors import safe_open
from torch import nn

from smolray.config import ModelConfig, RunConfig
from smolray.engine.pipeline.mesh import Mesh
from smolray.engine.pipeline.parameters import ParameterPlacement, placements_of
from smolray.engine.pipeline.split import split_of
from smolray.model.adapters import prepare_for_training
from smolray.model.load import empty_model, load_model
from smolray.model.parts import drop_submodules, frozen_prefix
from smolray.pretrained import DTYPES, stored_shapes, tensor_files


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
        fill(placements, stage, config.model)
    return model


def fill(placements: list[ParameterPlacement], stage: int, model: ModelConfig) -> None:
    """Read the tensors of a stage and no others. `placements`: of the whole model.

    A folder that lacks one of them, or has it in another shape, is read whole: `load_model` knows other names, and
    refuses weights that are missing.
    """
    files, own = tensor_files(model.path, model.revision), [p for p in placements if stage in p.stages]
    stored = stored_shapes(files)
    if any(stored.get(p.name) != tuple(p.parameter.shape) for p in placements):
        named = dict(load_model(model).named_parameters())
        for placement in own:
            placement.put(named[placement.name].detach().clone())
        return

    for file in {files[placement.name] for placement in own}:
        with safe_open(file, framework="pt") as tensors:
            for placement in own:
                if files[placement.name] == file:
                    placement.put(tensors.get_tensor(placement.name).to(DTYPES[model.dtype]))
