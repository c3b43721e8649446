"""`engine: auto`: the planner's choice for a run and the workers that it found, as settings of that run.

In: a run, its data and a Survey. Out: a Choice, or NothingFitsError. A run that has begun keeps the size of its
micro-batches and of its steps, by which its position is counted; all else is planned anew at each start, on the cards
that are there then.
"""

from dataclasses import dataclass
from typing import Any

from smolray.config import ConfigError, RunConfig, check_run
from smolray.planner.candidate import Candidate
from smolray.planner.describe import candidate_json, words
from smolray.planner.plan import make_plan
from smolray.planner.probe import HardwareProbe
from smolray.planner.shapes import ModelShape
from smolray.planner.statistics import DataStatistics


class NothingFitsError(ConfigError):
    """No strategy fits on the cards that are there; the message says what is lacking, and the nearest change that fits."""


@dataclass(frozen=True)
class Choice:
    """`run`: what is trained.

    `kept`: the run under which it is resumed. `nodes`: the id of each worker's node. `told`: the fields of a `plan`
    event.
    """

    run: RunConfig
    kept: RunConfig
    nodes: tuple[str, ...]
    told: dict[str, Any]


def bounded(config: RunConfig) -> RunConfig:
    """The run with the range of workers that `engine: auto` may take: at most resources.num_workers."""
    if config.engine.name != "auto" or isinstance(config.resources.num_workers, tuple):
        return config
    return config.replace({"resources.num_workers": (1, config.resources.workers[1])})


def choose(
    config: RunConfig, statistics: DataStatistics, seen: HardwareProbe, begun: bool, shape: ModelShape | None = None
) -> Choice:
    """Plan the run on what was seen. Raises NothingFitsError."""
    own = config.train.per_device_train_batch_size
    plan = make_plan(config, statistics, seen.inventory(), shape, (own,) if begun else None)
    if plan.chosen is None:
        raise NothingFitsError(words(plan))
    run, nodes = bind(config, plan.chosen, plan.settings(), seen)
    if begun:
        run = run.replace({"train.global_batch": config.global_batch})
    check_run(run)
    sizes = ("per_device_train_batch_size", "global_batch", "gradient_accumulation_steps")
    kept = config.replace({f"train.{name}": getattr(run.train, name) for name in sizes})
    settings = plan.settings() | {"train.global_batch": run.global_batch}
    told = {"words": words(plan), "settings": settings, "strategies": [candidate_json(row) for row in plan.rows]}
    return Choice(run, kept, nodes, told)


def bind(
    config: RunConfig, chosen: Candidate, settings: dict[str, Any], seen: HardwareProbe
) -> tuple[RunConfig, tuple[str, ...]]:
    """The run as planned, and the id of each worker's node.

    A pipeline's stages are bound to their cards; under ZeRO any order of ranks will do.
    """
    workers = [seen.workers[seen.rank_of(*place)] for place in chosen.gpus]
    bound = (
        {"engine.partition": chosen.partition, "engine.gpus": tuple(w.place for w in workers)}
        if chosen.partition
        else {"engine.gpus": None}
    )
    return config.replace({**settings, **bound}), tuple(w.node_id for w in workers)
