"""What a pipeline may be cut into: vision embeddings, each vision layer, merge, each text layer, head.

In: a model (its weights may be on the meta device) and the run. Out: a Split: which layers each stage runs, and which
parameters it owns. Merge is the tower's last norm, the connector and the token embedding; head is the last norm, the
language-model head and the loss.
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
# Guesses for the default cut; the planner knows the data.
TEXT_PER_IMAGE_TOKEN = 1.5  # half as much text as image tokens
TRAINED_SHARE = 0.1  # of the tokens: the head is applied there only


@dataclass(frozen=True)
class Split:
    """`layers` in the order of the forward pass; `cut`: how many of them each stage runs."""

    layers: tuple[str, ...]
    partition: tuple[int, ...]

    @property
    def stages(self) -> int:
        return len(self.partition)

    def of_stage(self, stage: int) -> tuple[str, ...]:
        first = sum(self.partition[:stage])
        return self.layers[first : first + self.partition[stage]]

    def stage_of(self, layer: str) -> int:
        return next(stage for stage in range(self.stages) if layer in self.of_stage(stage))

    def owners(self, names: tuple[str, ...]) -> tuple[int, ...]:
        """The stages that hold a parameter known by `names`, in order: two, where embedding and head are tied."""
        return tuple(sorted({self.stage_of(layer_of(name)) for name in names}))


def layer_of(name: str) -> str:
    """The layer of a parameter by its Hugging Face name, with or without what PEFT puts around it."""
    for pattern, layer in LAYER_PATTERNS:
        if found := pattern.search(name):
            return layer.format(*found.groups())
    raise ValueError(
        f"parameter {name} belongs to no layer of a pipeline: the model is not of the Idefics3 / SmolVLM family"
    )


def layer_names(model: nn.Module) -> tuple[str, ...]:
    """All layers in order; a model whose tower has been left out (its output comes with the data) begins with merge."""
    config, tower = base_model(model).config, next(base_model(model).model.vision_model.parameters(), None)
    vision = (
        () if tower is None else (EMBEDDINGS, *(f"vision.{i}" for i in range(config.vision_config.num_hidden_layers)))
    )
    return (*vision, MERGE, *(f"text.{i}" for i in range(config.text_config.num_hidden_layers)), HEAD)


def split_of(model: nn.Module, config: RunConfig, workers: int) -> Split:
    """The stages of a run on `workers` workers.

    Raises ConfigError where stages, cut, layers and workers do not fit each other.
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
            f"engine.pipeline_stages = {stages}: the model has {len(layers)} layers to cut; nearest: "
            f"engine.pipeline_stages={len(layers)}"
        )
    partition = engine.partition or even_partition(layer_costs(model, layers), stages)
    if len(partition) != stages or sum(partition) != len(layers):
        raise ConfigError(
            f"engine.partition = {list(partition)}: expected {stages} numbers, one a stage, that add up to "
            f"{len(layers)} layers ({layers[0]} … {layers[-1]})"
        )
    return Split(layers, partition)


def layer_costs(model: nn.Module, layers: tuple[str, ...]) -> tuple[float, ...]:
    """A simple estimate of each layer's work for one tile and its text: weights x positions, forward and what backward
    it needs.
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
            work[layer] += parameter.numel() * (
                patches if layer.startswith("vision") else tokens if layer == MERGE else text
            )
    work[HEAD] = config.text_config.vocab_size * config.text_config.hidden_size * text * TRAINED_SHARE
    costs, below = [], False
    for layer in layers:
        costs.append(work[layer] * (1 + below + (layer in trained)))
        below |= layer in trained
    return tuple(costs)


# This is not planner.partition.find_partition with equal GPUs. That one minimises the slowest stage and no more, under
# limits of memory; this one also evens out the stages behind it. Among partitions with the same slowest stage they
# choose differently, and the default partition of a run must stay what it is.
def even_partition(costs: tuple[float, ...], stages: int) -> tuple[int, ...]:
    """The number of layers in each stage such that the most expensive stage costs as little as possible.

    `costs`: of each layer, in order. Every stage gets at least one layer.
    """

    @cache
    def best(first: int, left: int) -> tuple[float, tuple[int, ...]]:
        if left == 1:
            return sum(costs[first:]), (len(costs) - first,)
        found = []
        for size in range(1, len(costs) - first - left + 2):
            worst, rest = best(first + size, left - 1)
            found.append((max(sum(costs[first : first + size]), worst), (size, *rest)))
        return min(found)

    return best(0, stages)[1]
