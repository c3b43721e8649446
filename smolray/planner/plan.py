"""Which strategy a run should take on these GPUs, and why; where none fits, the nearest change to the run that does.

In: RunConfig, DataStatistics, Inventory. Out: Plan. Pure: it reads nothing but its arguments (`shape_of` reads the
model's shape where none is passed).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from smolray.config import LoraConfig, RunConfig
from smolray.planner.candidate import NEARLY, Candidate
from smolray.planner.candidates import all_candidates, candidate_as_written
from smolray.planner.data_parallel import offload_settings
from smolray.planner.gpus import GPU
from smolray.planner.inventory import Inventory
from smolray.planner.model_files import shape_of
from smolray.planner.problem import PlanningProblem
from smolray.planner.shapes import ModelShape
from smolray.planner.statistics import DataStatistics

SIMPLEST_FIRST = ("single", "zero-0", "zero-2", "zero-1", "zero-3", "pipeline", "pipeline x data")


@dataclass(frozen=True)
class Change:
    """Settings that make a run fit which does not fit as written. `words`: what they do."""

    settings: dict[str, Any]
    words: str


@dataclass(frozen=True)
class Plan:
    """What the planner found.

    Attributes:
        rows: the best candidate of each strategy.
        chosen: the candidate to take; None where nothing fits.
        as_written: the run exactly as its settings say; None where the planner knows no such strategy.
        refused: the GPUs that cannot run the run, each with the reason.
        change: where nothing fits, the nearest change to the run after which something does; None: there is none.
        changed: the plan after that change.
    """

    config: RunConfig
    shape: ModelShape
    statistics: DataStatistics
    inventory: Inventory
    rows: tuple[Candidate, ...]
    chosen: Candidate | None
    as_written: Candidate | None
    refused: dict[GPU, str]
    change: Change | None = None
    changed: "Plan | None" = None

    def settings(self) -> dict[str, Any]:
        """The chosen plan as dotted settings of RunConfig, with the change that it needs. Empty where nothing fits."""
        if self.chosen is None:
            return {**self.change.settings, **self.changed.settings()} if self.change and self.changed else {}

        chosen = self.chosen
        common: dict[str, Any] = {
            "engine.name": "pipeline" if chosen.partition else "zero",
            "resources.num_workers": len(chosen.gpus),
            "train.per_device_train_batch_size": chosen.micro_batch,
            "train.global_batch": chosen.micro_batches,
            "train.gradient_accumulation_steps": 1,
            "model.gradient_checkpointing": chosen.checkpointing,
        }
        if chosen.zero:
            offload = {f"engine.{key}": value for key, value in offload_settings(chosen.zero).items()}
            return common | {"engine.stage": chosen.zero.stage} | offload
        return common | {
            "engine.pipeline_stages": len(chosen.partition),
            "engine.partition": list(chosen.partition),
            "engine.schedule": self.config.engine.schedule,
        }


def make_plan(
    config: RunConfig,
    statistics: DataStatistics,
    inventory: Inventory,
    shape: ModelShape | None = None,
    sizes: tuple[int, ...] | None = None,
) -> Plan:
    """Predict every strategy and choose the fastest that fits.

    An optimizer step keeps its number of conversations, whatever is chosen.

    Args:
        config: the run as written.
        statistics: its data.
        inventory: the GPUs.
        shape: its model; default: read where model.path says.
        sizes: of micro-batches, in conversations, where the planner must not choose them.

    Raises:
        ConfigError: the model's shape is not known.
    """
    shape = shape or shape_of(config.model)
    config = on_all_gpus(config, inventory)
    problem = PlanningProblem(config, shape, statistics, inventory, sizes)
    candidates = list(all_candidates(problem))
    plan = Plan(
        config,
        problem.shape,
        statistics,
        inventory,
        _rows(candidates, config),
        choose(candidates, config),
        candidate_as_written(problem),
        problem.refused,
    )
    if plan.chosen is not None:
        return plan

    lacks_bf16 = not problem.places and not all(gpu.cannot_run("float16") for gpu in problem.refused)
    first: dict[str, Any] = {"model.dtype": "float16"} if lacks_bf16 else {}
    for change, changed, counted in changes(config, statistics, shape, first):
        leanest = PlanningProblem(changed, shape, counted, inventory, sizes=(1,), checkpointing=(True,))
        if choose(list(all_candidates(leanest)), changed) is not None:
            after = make_plan(changed, counted, inventory, shape)
            if after.chosen is not None:
                return replace(plan, change=change, changed=after)
    return plan


def choose(candidates: Sequence[Candidate], config: RunConfig) -> Candidate | None:
    """The fastest candidate that fits; of those nearly as fast the simplest, then the nearest to the run as written."""
    fitting = [c for c in candidates if c.fits]
    if not fitting:
        return None
    fastest = max(c.samples_per_second for c in fitting)
    return min((c for c in fitting if c.samples_per_second >= NEARLY * fastest), key=lambda c: _preference(c, config))


def on_all_gpus(config: RunConfig, inventory: Inventory) -> RunConfig:
    """The run with `resources.num_workers: auto` as a number: a worker for each GPU of the inventory.

    A run that names its global batch has no more workers than that.
    """
    if config.resources.num_workers != "auto":
        return config
    gpus = sum(len(node.gpus) for node in inventory.nodes)
    return config.replace({"resources.num_workers": min(gpus, config.train.global_batch or gpus)})


def changes(
    config: RunConfig, statistics: DataStatistics, shape: ModelShape, first: dict[str, Any]
) -> Iterator[tuple[Change, RunConfig, DataStatistics]]:
    """Changes to a run, the smallest first: LoRA, 8 bit, 4 bit, fewer tiles, and these together.

    Yields each change with the run and the data statistics after it. `first`: settings that every change needs.
    """
    methods = [({**first, **settings}, words) for settings, words in _method_changes(config)]
    needed = f"{first['model.dtype']} in place of {config.model.dtype}" if first else ""
    limits = [limit for limit in (13, 9, 5, 3, 1) if limit < statistics.most_tiles]
    for limit in (None, *limits):
        counted = statistics if limit is None else statistics.with_max_tiles(limit, shape)
        for settings, words in methods:
            whole = settings if limit is None else {**settings, "image.max_tiles": limit}
            if whole:
                parts = (needed, words, f"at most {limit} tiles an image" if limit else "")
                change = Change(
                    {key: _plain(value) for key, value in whole.items()}, " and ".join(part for part in parts if part)
                )
                yield change, config.replace(whole), counted


def _method_changes(config: RunConfig) -> list[tuple[dict[str, Any], str]]:
    """No change, LoRA, and LoRA over fewer bits: (settings, words)."""
    methods: list[tuple[dict[str, Any], str]] = [({}, "")]
    if config.lora is None or config.model.train:
        methods.append(({"model.train": (), "lora": config.lora or LoraConfig()}, "LoRA in place of full fine-tuning"))

    lora = methods[-1][0]
    for bits in (8, 4):
        if not (config.model.load_in_4bit or (config.model.load_in_8bit and bits == 8)):
            settings = {**lora, "model.load_in_8bit": bits == 8, "model.load_in_4bit": bits == 4}
            settings |= {"model.compile": False} if config.model.compile and bits == 8 else {}  # config/rules.py
            methods.append((settings, f"{'LoRA over ' if lora else ''}weights in {bits} bit"))
    return methods


def _rows(candidates: Sequence[Candidate], config: RunConfig) -> tuple[Candidate, ...]:
    """For each strategy the best candidate that fits, or the one that lacks least memory."""
    by_name: dict[tuple[int, str], list[Candidate]] = {}
    for candidate in candidates:
        by_name.setdefault((SIMPLEST_FIRST.index(candidate.strategy), candidate.name), []).append(candidate)
    return tuple(choose(found, config) or min(found, key=lambda c: c.missing) for _, found in sorted(by_name.items()))


def _preference(candidate: Candidate, config: RunConfig) -> tuple[Any, ...]:
    """The smallest is preferred: no offload, a simple strategy, few GPUs, then settings near to the run's own."""
    offloads = candidate.zero is not None and candidate.zero.offload_optimizer + candidate.zero.offload_param
    away = abs(math.log2(candidate.micro_batch / config.train.per_device_train_batch_size))
    differs = candidate.checkpointing != config.model.gradient_checkpointing
    order = (offloads, SIMPLEST_FIRST.index(candidate.strategy), len(candidate.gpus), differs, away)
    return (*order, -candidate.samples_per_second, candidate.gpus)


def _plain(value: Any) -> Any:
    """The value as YAML and JSON write it."""
    if isinstance(value, LoraConfig):
        return value.model_dump(mode="json", exclude_defaults=True) or {"r": value.r}
    return list(value) if isinstance(value, tuple) else value
