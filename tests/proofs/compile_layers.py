"""Compile the layers of a model for a pretended card (model.compile), and print how many graphs that takes as JSON.

`python -m tests.proofs.compile_layers rtx3090 random-256m 80,1000 1,3`: a shape, lengths in tokens, and numbers of
tiles, one for each length in turn.
"""

import argparse
import json
from itertools import cycle

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from jobs.gpu.shapes import random_model
from smolray.model.adapters import checkpoint_layers
from smolray.model.attention import Layout
from smolray.model.forward import run_layers
from smolray.model.kernels import compile_layers
from smolray.model.tiny import SHAPES
from tests.proofs.pretended import Compiled

LAYERS = 2  # of the tower and of the text model: they share their graphs


def thin(shape: str) -> str:
    """The name of a shape with few layers."""
    spec = SHAPES[shape]
    parts = {name: {**spec[name], "num_hidden_layers": LAYERS} for name in ("vision", "text")}
    SHAPES["thin"] = {**spec, **parts}
    return "thin"


def through(model: nn.Module, length: int, tiles: int) -> None:
    """Forward through all layers, and backward where there are gradients."""
    vision, text = model.config.vision_config, model.config.text_config
    patches = (vision.image_size // vision.patch_size) ** 2
    options = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    encoder = model.model.vision_model.encoder
    seen = encoder(inputs_embeds=torch.empty(tiles, patches, vision.hidden_size, **options)).last_hidden_state

    branch, groups, position_ids = (torch.zeros(n, dtype=torch.int64, device="cuda") for n in (length, 3, length))
    positions = torch.zeros(min(length, 7), dtype=torch.int64, device="cuda")
    hidden = torch.empty(1, length, text.hidden_size, **options)
    inputs = {"attention_mask": None, "layout": Layout(branch, groups)}
    read = run_layers(model.model.text_model, hidden, position_ids[None], positions, **inputs)
    if torch.is_grad_enabled():
        (seen.sum() + read.sum()).backward()


def main() -> None:
    """Compile, and print the graphs, and the kernels of FlexAttention among what was made."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("card", "shape", "lengths", "tiles"):
        parser.add_argument(name)
    asked = parser.parse_args()
    lengths, compiled, found = [*map(int, asked.lengths.split(","))], Compiled(asked.card), {}
    # the tower's attention: torch chooses its kernel by asking the driver
    F.scaled_dot_product_attention = lambda query, key, value, **_: query + key + value

    with FakeTensorMode(allow_non_fake_inputs=True):
        model = random_model(thin(asked.shape), torch.bfloat16, torch.device("cuda"))
        compile_layers(model)
        for kind in ("trained", "evaluated", "checkpointed"):
            model.train(kind != "evaluated")
            checkpoint_layers(model.model, kind == "checkpointed")
            before = compiled.graphs
            with torch.set_grad_enabled(kind != "evaluated"):
                for length, tiles in zip(lengths, cycle(map(int, asked.tiles.split(","))), strict=False):
                    through(model, length, tiles)
            found[kind] = compiled.graphs - before
    attention = sum("tem_fused" in name for name, _ in compiled.kernels)
    print(json.dumps(found | {"attention": attention}))


if __name__ == "__main__":
    main()
