"""How a pipeline splits the model: its layers, and which stage runs which of them.

A layer of the pipeline is the smallest piece that a stage can hold: the vision embeddings, each layer of the vision
tower, merge, each layer of the text model, head. Merge is the tower's last norm, the connector and the token embedding;
head is the last norm, the language-model head and the loss.

In: a model (its weights may be on the meta device) and the run. Out: a Split.
"""

import re
from dataclasses import dataclass
from functools import cache

from torch import nn

from smolray.config import ConfigError, RunConfig
from smolray.engine.optim import EMBEDDINGS as LOOKED_UP
from smolray.model.load import base_model

EMBEDDINGS, MERGE, HEAD = "vision_embeddings", "merge", "head"
LAYER_PATTERNS = (
    (re.compile(r"\bvision_model\.encoder\.layers\.(\d+)\."), "vision.{}"),
    (re.compile(r"\bvision_model\.embeddings\."), EMBEDDINGS),
    (re.compile(r"\btext_model\.layers\.(\d+)\."), "text.{}"),
    (re.compile(r"\b(?:vision_model\.post_layernorm|connector|text_model\.embed_tokens)\."), MERGE),
    (re.compile(r"\b(?:text_model\.norm|lm_head)\."), HEAD),
)
# Guesses for the default partition; the planner knows the data.
TEXT_PER_IMAGE_TOKEN = 1.5  # half as much text as image tokens
TRAINED_SHARE = 0.1  # of the tokens: the head is applied there only


@dataclass(frozen=True)
class Split:
    """`layers`: in the order of the forward pass; `partition`: how many of them each stage runs."""

    layers: tuple[str, ...]
    partition: tuple[int, ...]

    @property
    def stages(self) -> int:
        return len(self.partition)

    def of_stage(self, stage: int) -> tuple[str, ...]:
        """The layers of a stage."""
        first = sum(self.partition[:stage])
        return self.layers[first : first + self.partition[stage]]

    def stage_of(self, layer: str) -> int:
        return next(stage for stage in range(self.stages) if layer in self.of_stage(stage))

    def owners(self, names: tuple[str, ...]) -> tuple[int, ...]:
        """The stages that hold a parameter with these names, in order: two where embedding and head are tied."""
        return tuple(sorted({self.stage_of(layer_of(name)) for name in names}))


def layer_of(name: str) -> str:
    """The layer of a parameter by its Hugging Face name, with or without PEFT's prefixes.

    Raises:
        ValueError: the name is not of an Idefics3 or SmolVLM model.
    """
    for pattern, layer in LAYER_PATTERNS:
        if found := pattern.search(name):
            return layer.format(*found.groups())
    raise ValueError(
        f"parameter {name} belongs to no layer of a pipeline: the model is not of the Idefics3 / SmolVLM family"
    )


def layer_names(model: nn.Module) -> tuple[str, ...]:
    """All layers in order. A model without its vision tower (its features come with the data) begins with merge."""
    config, inner = base_model(model).config, base_model(model).model
    text = (f"text.{i}" for i in range(config.text_config.num_hidden_layers))
    if next(inner.vision_model.parameters(), None) is None:
        return (MERGE, *text, HEAD)
    vision = (f"vision.{i}" for i in range(config.vision_config.num_hidden_layers))
    return (EMBEDDINGS, *vision, MERGE, *text, HEAD)


def split_of(model: nn.Module, config: RunConfig, workers: int) -> Split:
    """The stages of a run on `workers` workers.

    Raises:
        ConfigError: stages, partition, layers and workers do not fit each other.
    """
    engine, layers = config.engine, layer_names(model)
    stages = engine.pipeline_stages or (len(engine.partition) if engine.partition else workers)
    if workers % stages:
        raise ConfigError(
            f"engine.pipeline_stages = {stages} on {workers} workers: every pipeline needs {stages} of them; "
            f"nearest: resources.num_workers={max(workers // stages, 1) * stages}"
        )
    if stages > len(layers):
        raise ConfigError(
            f"engine.pipeline_stages = {stages}: the model has {len(layers)} layers to distribute; "
            f"nearest: engine.pipeline_stages={len(layers)}"
        )

    partition = engine.partition or even_partition(layer_costs(model, layers), stages)
    if len(partition) != stages or sum(partition) != len(layers):
        raise ConfigError(
            f"engine.partition = {list(partition)}: expected {stages} numbers, one for each stage, that add up to "
            f"{len(layers)} layers ({layers[0]} … {layers[-1]})"
        )
    return Split(layers, partition)


def layer_costs(model: nn.Module, layers: tuple[str, ...]) -> tuple[float, ...]:
    """A rough estimate of each layer's work for one tile and its text, in multiply-adds.

    Weights x positions, once for the forward pass, once more for each gradient that the backward pass computes.
    """
    config = base_model(model).config
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    tokens = patches / config.scale_factor**2
    text = tokens * TEXT_PER_IMAGE_TOKEN

    work, trained = dict.fromkeys(layers, 0.0), set()
    for name, parameter in model.named_parameters():
        layer = layer_of(name)
        if parameter.requires_grad:
            trained.add(layer)
        if parameter.ndim >= 2 and not name.endswith(LOOKED_UP):
            positions = patches if layer.startswith("vision") else tokens if layer == MERGE else text
            work[layer] += parameter.numel() * positions
    work[HEAD] = config.text_config.vocab_size * config.text_config.hidden_size * text * TRAINED_SHARE

    costs, trained_before = [], False
    for layer in layers:
        costs.append(work[layer] * (1 + trained_before + (layer in trained)))
        trained_before |= layer in trained
    return tuple(costs)


# This is not planner.partition.find_partition with equal GPUs. That one minimises the slowest stage and no more, under
# limits of memory; this one also evens out the stages behind it. Among partitions with the same slowest stage they
# choose differently, and the default partition of a run must stay what it is.
def even_partition(costs: tuple[float, ...], stages: int) -> tuple[int, ...]:
    """The number of layers in each stage such that the most expensive stage costs as little as possible.

    `costs`: of each layer, in order. Every stage gets at least one layer.
    """

    @cache
    def best(first: int, stages_left: int) -> tuple[float, tuple[int, ...]]:
        """(cost of the most expensive stage, sizes) of the layers from `first` on."""
        if stages_left == 1:
            return sum(costs[first:]), (len(costs) - first,)

        found = []
        for size in range(1, len(costs) - first - stages_left + 2):
            worst, rest = best(first + size, stages_left - 1)
            found.append((max(sum(costs[first : first + size]), worst), (size, *rest)))
        return min(found)

    return best(0, stages)[1]
