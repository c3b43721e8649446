"""Which strategy a run should take on these cards, and why; and where none fits, the nearest change to the run that
does.

In: RunConfig, DataStatistics, Inventory. Out: Plan. Pure: nothing is read but what is passed in (the model's shape is
read by `shape_of`).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from smolray.config import LoraConfig, RunConfig
from smolray.planner.candidates import Candidate, CandidateGenerator, gpu_meshes, offload_settings
from smolray.planner.inventory import Inventory
from smolray.planner.shapes import ModelShape, shape_of
from smolray.planner.statistics import DataStatistics

# candidates this close to the fastest are judged by how simple they are: predictions are not better than that
NEARLY = 0.97
SIMPLEST_FIRST = ("single", "zero-0", "zero-2", "zero-1", "zero-3", "pipeline", "pipeline x data")


@dataclass(frozen=True)
class Change:
    """Settings that make a run fit which does not fit as written."""

    settings: dict[str, Any]
    words: str


@dataclass(frozen=True)
class Plan:
    """`rows`: the best candidate of each strategy.

    `chosen`: None where nothing fits, and then `change` and `changed`, the plan after it.
    """

    config: RunConfig
    shape: ModelShape
    statistics: DataStatistics
    inventory: Inventory
    rows: tuple[Candidate, ...]
    chosen: Candidate | None
    as_written: Candidate | None
    change: Change | None = None
    changed: "Plan | None" = None

    def settings(self) -> dict[str, Any]:
        """The chosen plan as dotted settings of RunConfig, a change that it needs included; empty where nothing fits."""
        if self.chosen is None:
            return {**self.change.settings, **self.changed.settings()} if self.change and self.changed else {}
        chosen = self.chosen
        found: dict[str, Any] = {
            "engine.name": "pipeline" if chosen.partition else "zero",
            "resources.num_workers": len(chosen.gpus),
            "train.per_device_train_batch_size": chosen.micro_batch,
            "train.global_batch": chosen.micro_batches,
            "train.gradient_accumulation_steps": 1,
            "model.gradient_checkpointing": chosen.checkpointing,
        }
        if chosen.zero:
            found |= {
                "engine.stage": chosen.zero.stage,
                **{f"engine.{key}": value for key, value in offload_settings(chosen.zero).items()},
            }
        else:
            found |= {
                "engine.pipeline_stages": len(chosen.partition),
                "engine.partition": list(chosen.partition),
                "engine.schedule": self.config.engine.schedule,
            }
        return found


def make_plan(
    config: RunConfig,
    statistics: DataStatistics,
    inventory: Inventory,
    shape: ModelShape | None = None,
    sizes: tuple[int, ...] | None = None,
) -> Plan:
    """Predict every strategy and choose the fastest that fits.

    `sizes`: of micro-batches, where they are not the planner's to choose.

    Raises ConfigError where the model's shape is not known. The optimizer step keeps its number of conversations,
    whatever is chosen.
    """
    shape = shape or shape_of(config.model)
    config = on_all_gpus(config, inventory)
    generator = CandidateGenerator(config, shape, statistics, inventory, sizes)
    candidates = list(generator.candidates())
    plan = Plan(
        config,
        generator.shape,
        statistics,
        inventory,
        _rows(candidates, config),
        choose(candidates, config),
        written(generator),
    )
    if plan.chosen is not None:
        return plan
    for change, changed, counted in changes(config, statistics, shape):
        narrow = CandidateGenerator(changed, shape, counted, inventory, sizes=(1,), checkpointing=(True,))
        if choose(list(narrow.candidates()), changed) is not None:
            after = make_plan(changed, counted, inventory, shape)
            if after.chosen is not None:
                return replace(plan, change=change, changed=after)
    return plan


def choose(candidates: Sequence[Candidate], config: RunConfig) -> Candidate | None:
    """The fastest that fits; among those nearly as fast the simplest, and the one nearest to the run as written."""
    fitting = [c for c in candidates if c.fits]
    if not fitting:
        return None
    fastest = max(c.samples_per_second for c in fitting)
    return min((c for c in fitting if c.samples_per_second >= NEARLY * fastest), key=lambda c: _preference(c, config))


def predict(
    config: RunConfig, statistics: DataStatistics, inventory: Inventory, shape: ModelShape | None = None
) -> Candidate | None:
    """The run exactly as its settings say, for comparison with a measurement; None where the planner knows no such
    strategy.
    """
    config = on_all_gpus(config, inventory)
    return written(CandidateGenerator(config, shape or shape_of(config.model), statistics, inventory))


def on_all_gpus(config: RunConfig, inventory: Inventory) -> RunConfig:
    """The run with `resources.num_workers: auto` as a number: a worker for each GPU of the inventory.

    A run that names its global batch has no more workers than that.
    """
    if config.resources.num_workers != "auto":
        return config
    gpus = sum(len(node.gpus) for node in inventory.nodes)
    return config.replace({"resources.num_workers": min(gpus, config.train.global_batch or gpus)})


def written(generator: CandidateGenerator) -> Candidate | None:
    """The run as its settings say, on as many cards as it has workers, the fastest first; a pipeline's stages on the
    cards in their order.
    """
    config, inventory = generator.config, generator.inventory
    engine, size = config.engine, config.train.per_device_train_batch_size
    places = [(b, c) for b, node in enumerate(inventory.nodes) for c in range(len(node.gpus))]
    workers = min(config.resources.workers[1], len(places))
    chosen = tuple(sorted(sorted(places, key=lambda p: -generator.gpu(p).tflops_16)[:workers]))
    own = replace(generator, sizes=(size,), checkpointing=(config.model.gradient_checkpointing,))
    mean, largest = own.workloads(size)[0]
    if engine.name == "pipeline":
        mesh = next((g for g in gpu_meshes(chosen) if engine.pipeline_stages in (None, sum(map(len, g.nodes)))), None)
        return own.pipeline(size, mean, largest, mesh, engine.partition) if mesh else None
    if engine.name != "zero":
        return None
    for found in own.data_parallel(size, mean, largest, chosen, {}):
        zero = found.zero
        offloads = zero and (zero.offload_optimizer, zero.offload_param) == (
            engine.offload_optimizer == "cpu",
            engine.offload_param == "cpu",
        )
        if (
            zero
            and offloads
            and (zero.stage == engine.stage or (workers == 1 and {zero.stage, engine.stage} <= {1, 2}))
        ):
            return found
    return None


def changes(
    config: RunConfig, statistics: DataStatistics, shape: ModelShape
) -> Iterator[tuple[Change, RunConfig, DataStatistics]]:
    """Changes to a run from the least to the most: LoRA, 8 bit, 4 bit, fewer tiles, and these together."""
    methods: list[tuple[dict[str, Any], str]] = [({}, "")]
    if config.lora is None or config.model.train:
        methods.append(({"model.train": (), "lora": config.lora or LoraConfig()}, "LoRA in place of full fine-tuning"))
    lora = methods[-1][0]
    for bits in (8, 4):
        if not (config.model.load_in_4bit or (config.model.load_in_8bit and bits == 8)):
            setting = {**lora, "model.load_in_8bit": bits == 8, "model.load_in_4bit": bits == 4}
            methods.append((setting, f"{'LoRA over ' if lora else ''}weights in {bits} bit"))
    tiles = [n for n in (13, 9, 5, 3, 1) if n < statistics.most_tiles]
    for limit in (None, *tiles):
        counted = statistics if limit is None else statistics.with_max_tiles(limit, shape.tokens_per_tile)
        for settings, words in methods:
            whole = settings if limit is None else {**settings, "image.max_tiles": limit}
            if whole:
                said = " and ".join(w for w in (words, f"at most {limit} tiles an image" if limit else "") if w)
                yield Change({k: _plain(v) for k, v in whole.items()}, said), config.replace(whole), counted


def _rows(candidates: Sequence[Candidate], config: RunConfig) -> tuple[Candidate, ...]:
    """For each strategy the best that fits, or the one that lacks least."""
    by_name: dict[tuple[int, str], list[Candidate]] = {}
    for candidate in candidates:
        by_name.setdefault((SIMPLEST_FIRST.index(candidate.strategy), candidate.name), []).append(candidate)
    return tuple(choose(found, config) or min(found, key=lambda c: c.missing) for _, found in sorted(by_name.items()))


def _preference(candidate: Candidate, config: RunConfig) -> tuple[Any, ...]:
    offloads = candidate.zero is not None and candidate.zero.offload_optimizer + candidate.zero.offload_param
    away = abs(math.log2(candidate.micro_batch / config.train.per_device_train_batch_size))
    differs = candidate.checkpointing != config.model.gradient_checkpointing
    order = (offloads, SIMPLEST_FIRST.index(candidate.strategy), len(candidate.gpus), differs, away)
    return (*order, -candidate.samples_per_second, candidate.gpus)


def _plain(value: Any) -> Any:
    """As YAML and JSON write it."""
    if isinstance(value, LoraConfig):
        return value.model_dump(mode="json", exclude_defaults=True) or {"r": value.r}
    return list(value) if isinstance(value, tuple) else value
