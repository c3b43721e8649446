"""The model of a run as it was trained: the base with a checkpoint's weights, with adapters merged where asked."""

from typing import Any

from smolray.config import RunConfig
from smolray.model.adapters import merge, prepare_for_training, trainable
from smolray.model.load import load_model
from smolray.run.checkpoint import Checkpoint, read_weights
from smolray.run.state import canonical_name, load_weights


def trained_model(config: RunConfig, chosen: Checkpoint) -> Any:
    """The model of a run with the weights of a checkpoint, ready to look at data."""
    model = prepare_for_training(load_model(config.model), config)
    load_weights({canonical_name(n): p for n, p in trainable(model).items()}, read_weights(chosen))
    return model.eval()


def unquantised(config: RunConfig) -> RunConfig:
    """The run with 16-bit weights in place of 4- or 8-bit ones: adapters are merged into those only."""
    return config.replace({"model.load_in_4bit": False, "model.load_in_8bit": False})


def merged_model(config: RunConfig, chosen: Checkpoint) -> Any:
    """The transformers model of a checkpoint, LoRA merged into unquantised weights."""
    return merge(trained_model(unquantised(config), chosen))
