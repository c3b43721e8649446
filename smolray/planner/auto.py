"""`engine: auto`: the planner's choice for a run on the workers that were found, as settings of that run.

In: a run, its data and a HardwareProbe. Out: a Choice, or NothingFitsError. A run that has started keeps the size of
its micro-batches and of its steps, in which its position is counted. Everything else is planned again at each start, on
the GPUs that are there then.
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
    """No strategy fits on the GPUs found. The message says what is lacking, and the nearest change that fits."""


@dataclass(frozen=True)
class Choice:
    """What the planner chose.

    Attributes:
        run: what is trained.
        kept: the run as it is stored, to be planned again when it is resumed.
        nodes: the id of each worker's node.
        reported: the fields of a `plan` event.
    """

    run: RunConfig
    kept: RunConfig
    nodes: tuple[str, ...]
    reported: dict[str, Any]


def bounded(config: RunConfig) -> RunConfig:
    """The run with the range of workers that `engine: auto` may take: at most resources.num_workers."""
    if config.engine.name != "auto" or isinstance(config.resources.num_workers, tuple):
        return config
    return config.replace({"resources.num_workers": (1, config.resources.workers[1])})


def choose(
    config: RunConfig, statistics: DataStatistics, seen: HardwareProbe, begun: bool, shape: ModelShape | None = None
) -> Choice:
    """Plan the run on the hardware found.

    Args:
        config: the run, with `engine: auto`.
        statistics: its data.
        seen: the workers.
        begun: the run has started before.
        shape: its model; default: read where model.path says.

    Raises:
        NothingFitsError: no strategy fits.
    """
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
    reported = {"words": words(plan), "settings": settings, "strategies": [candidate_json(row) for row in plan.rows]}
    return Choice(run, kept, nodes, reported)


def bind(
    config: RunConfig, chosen: Candidate, settings: dict[str, Any], seen: HardwareProbe
) -> tuple[RunConfig, tuple[str, ...]]:
    """The run as planned, and the id of each worker's node.

    The stages of a pipeline are bound to their GPUs. Under ZeRO the order of the ranks does not matter.
    """
    workers = [seen.workers[seen.rank_of(*place)] for place in chosen.gpus]
    bound = (
        {"engine.partition": chosen.partition, "engine.gpus": tuple(w.place for w in workers)}
        if chosen.partition
        else {"engine.gpus": None}
    )
    return config.replace({**settings, **bound}), tuple(w.node_id for w in workers)
