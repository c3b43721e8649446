"""`engine: auto`: the planner's choice for a run and the workers that it found, as settings of that run.

In: a run, its data and a Survey. Out: a Choice, or NothingFitsError. A run that has begun keeps the size of its micro-batches and of its steps, by which
its position is counted; all else is planned anew at each start, on the cards that are there then.
"""

from dataclasses import dataclass
from typing import Any

from smolray.config import ConfigError, RunConfig, check_run
from smolray.planner.plan import make_plan, with_settings
from smolray.planner.search import Candidate
from smolray.planner.shapes import ModelShape
from smolray.planner.statistics import DataStatistics
from smolray.planner.text import candidate_json, words
from smolray.survey import Survey


class NothingFitsError(ConfigError):
    """No strategy fits on the cards that are there; the message says what is lacking, and the nearest change that fits."""


@dataclass(frozen=True)
class Choice:
    """`run`: what is trained. `kept`: the run under which it is resumed. `nodes`: the id of each worker's node. `told`: the fields of a `plan` event."""

    run: RunConfig
    kept: RunConfig
    nodes: tuple[str, ...]
    told: dict[str, Any]


def bounded(config: RunConfig) -> RunConfig:
    """The run with the range of workers that `engine: auto` may take: at most resources.num_workers."""
    if config.engine.name != "auto" or isinstance(config.resources.num_workers, tuple):
        return config
    return with_settings(config, {"resources.num_workers": (1, config.resources.num_workers)})


def choose(config: RunConfig, statistics: DataStatistics, seen: Survey, begun: bool, shape: ModelShape | None = None) -> Choice:
    """Plan the run on what was seen. Raises NothingFitsError."""
    own = config.train.per_device_train_batch_size
    plan = make_plan(config, statistics, seen.inventory(), shape, (own,) if begun else None)
    if plan.chosen is None:
        raise NothingFitsError(words(plan))
    settings = plan.settings()
    if begun:
        settings |= {"train.global_batch": config.global_batch}
    kept = {key: settings[key] for key in ("train.per_device_train_batch_size", "train.global_batch", "train.gradient_accumulation_steps")}
    run = with_settings(config, settings | {"engine.cards": cards_of(plan.chosen, seen)})
    check_run(run)
    nodes = tuple(seen.workers[seen.rank_of(*place)].node_id for place in plan.chosen.cards)
    told = {"words": words(plan), "settings": settings, "strategies": [candidate_json(row) for row in plan.rows]}
    return Choice(run, with_settings(config, kept), nodes, told)


def cards_of(chosen: Candidate, seen: Survey) -> tuple[str, ...] | None:
    """The place of each stage, pipeline after pipeline; None under ZeRO, where any order will do."""
    return tuple(seen.workers[seen.rank_of(*place)].place for place in chosen.cards) if chosen.cut else None
