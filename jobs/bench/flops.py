"""Floating-point operations of training, as the planner counts them: how many times as fast a way can be.

In: the settings of a way, and its data. Out: operations of a conversation, forward and backward. The limit of a way is
its peer's operations over its own; what is measured is a share of it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from smolray.config import RunConfig, load_config
from smolray.planner.memory import Workload
from smolray.planner.shapes import ModelShape, Training, left_out
from smolray.planner.statistics import DataStatistics, Load
from smolray.planner.time import forward_flops, layer_work

FRONT = ("vision_embeddings", "vision", "merge")  # the layers that make vision features


@dataclass(frozen=True)
class Work:
    """What a conversation of a data set takes in micro-batches of `batch`."""

    config: RunConfig
    shape: ModelShape
    data: DataStatistics
    batch: int

    @classmethod
    def of(cls, shards: str, settings: Sequence[str], batch: int) -> "Work":
        """From shards, and settings that name a model folder."""
        from smolray.data.local import local_index

        config = load_config(None, list(settings))
        folder = Path(config.model.path)
        shape = ModelShape.from_config(json.loads((folder / "config.json").read_text()), str(folder))
        return cls(config, shape, DataStatistics.from_index(local_index(shards, config)), batch)

    @cached_property
    def training(self) -> float:
        """Operations of training as the settings say: an image is seen once for all its conversations, or not at all
        where its features are read.
        """
        return self._operations(self.config, self._load)

    @cached_property
    def separate(self) -> float:
        """Operations where each conversation is a sequence of its own and sees its image again."""
        alone = self.config.replace({"data.packing": "none", "model.vision_features": "compute"})
        load, _ = self.data.loads(alone, self.batch)
        conversations = sum(len(row.lengths) for row in self.data.rows)
        tiles = sum(row.tiles * len(row.lengths) for row in self.data.rows) / conversations
        return self._operations(alone, replace(load, tiles=tiles * load.samples))

    @cached_property
    def features(self) -> float:
        """Operations of writing the vision features, for one conversation's share of its image."""
        layers = (layer for layer in self.shape.layers if layer.kind in FRONT)
        return sum(sum(forward_flops(self.shape, layer, self._load)) for layer in layers) / self._load.samples

    def once(self, epochs: int) -> float:
        """How many times as fast so many epochs can be with vision features that are written once, not computed in
        every epoch. The settings are of a run with a frozen tower.
        """
        every = replace(self, config=self.config.replace({"model.vision_features": "compute"})).training
        read = replace(self, config=self.config.replace({"model.vision_features": "precompute"})).training
        return epochs * every / (self.features + epochs * read)

    @property
    def _load(self) -> Load:
        return self.data.loads(self.config, self.batch)[0]

    def _operations(self, config: RunConfig, load: Load) -> float:
        shape = replace(self.shape, left_out=left_out(config))
        work = Workload(shape, Training.of(config), load, config.model.gradient_checkpointing)
        layers = [layer_work(work, *each) for each in zip(shape.layers, work.gradients, strict=True)]
        forward = sum(each.forward * (each.ahead + each.again) for each in layers)
        return (forward + sum(each.backward or 0.0 for each in layers)) / load.samples
