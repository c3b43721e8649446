"""The model of a run as it was trained: the base model with a checkpoint's weights, adapters merged or not.

In: the run and a Checkpoint. Out: a model for evaluation, or a transformers model to export.
"""

from typing import Any

from smolray.config import RunConfig
from smolray.model.adapters import merge, prepare_for_training, trainable
from smolray.model.load import load_model
from smolray.run.checkpoint import Checkpoint, read_weights
from smolray.run.state import canonical_name, load_weights


def trained_model(config: RunConfig, chosen: Checkpoint) -> Any:
    """The model of a run with the weights of a checkpoint, in evaluation mode."""
    model = prepare_for_training(load_model(config.model), config)
    load_weights({canonical_name(n): p for n, p in trainable(model).items()}, read_weights(chosen))
    return model.eval()


def unquantised(config: RunConfig) -> RunConfig:
    """The run with 16-bit weights instead of 4- or 8-bit ones: adapters can only be merged into those."""
    return config.replace({"model.load_in_4bit": False, "model.load_in_8bit": False})


def merged_model(config: RunConfig, chosen: Checkpoint) -> Any:
    """The transformers model of a checkpoint, LoRA merged into unquantised weights."""
    return merge(trained_model(unquantised(config), chosen))
