"""`smolray plan --measure`: trains a few steps of the chosen plan and compares them with the prediction.

In: a run with data, and the GPUs of a cluster. Out: the Plan, and a Measurement of it.
"""

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from smolray.cluster.connect import connect
from smolray.config import RunConfig, check_run
from smolray.data.ray_jobs import load_index
from smolray.launch import driver as launch
from smolray.launch.data import prepare_data
from smolray.launch.ray_train import fit
from smolray.launch.resolve import with_absolute_paths
from smolray.planner.auto import NothingFitsError, bind
from smolray.planner.describe import words
from smolray.planner.plan import Plan, make_plan
from smolray.planner.statistics import DataStatistics
from smolray.train.task import WorkerTask

STEPS, WARM_UP = 8, 2  # steps that are trained; the first WARM_UP of them are not counted


@dataclass(frozen=True)
class Measurement:
    """Medians of a few steps; `memory`: peak bytes of each worker, in the order of their ranks."""

    seconds: float
    data_wait_seconds: float
    memory: tuple[int, ...]
    steps: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_plan(config: RunConfig) -> tuple[Plan, Measurement]:
    """Plan the run on the GPUs of the cluster and train its first steps as planned.

    Raises NothingFitsError where no plan fits, and ConfigError where there are no data.
    """
    connect()
    config = with_absolute_paths(config)
    config, folders, _ = prepare_data(config)

    seen = launch.look(config)
    sizes = DataStatistics.from_index(load_index(folders.train, config), config.data.repeats)
    plan = make_plan(config, sizes, seen.inventory())
    if plan.chosen is None:
        raise NothingFitsError(words(plan))

    run, nodes = bind(config, plan.chosen, plan.settings() | {"train.max_steps": STEPS}, seen)
    check_run(run)
    record = fit(run, folders, WorkerTask.MEASURE, nodes)
    if "error" in record:
        raise launch.RunError(record["error"])

    kept = slice(min(WARM_UP, len(record["seconds"]) - 1), None)
    seconds, waits = (statistics.median(record[name][kept]) for name in ("seconds", "waits"))
    return plan, Measurement(seconds, waits, tuple(record["memory"]), len(record["seconds"][kept]))


def measurement_table(plan: Plan, measured: Measurement) -> Table:
    """The prediction next to the measurement: seconds of a step, and the memory of the fullest worker."""
    assert plan.chosen is not None
    chosen, time = plan.chosen, plan.chosen.time
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in (chosen.name, "predicted", "measured", "measured / predicted"):
        table.add_column(column, justify="left" if column == chosen.name else "right")

    # torch counts tensors; a CPU's worker is counted with all that it has loaded
    host = any(plan.inventory.nodes[node].gpus[gpu].host for node, gpu in chosen.gpus)
    memory, peak = max(m.total if host else m.tensors for m in chosen.memory), max(measured.memory)
    table.add_row("s/step", f"{time.total:.3g}", f"{measured.seconds:.3g}", f"{measured.seconds / time.total:.2f}")
    table.add_row(
        f"GB{'' if host else ' of tensors'}, fullest worker",
        f"{memory / 1e9:.2f}",
        f"{peak / 1e9:.2f}",
        f"{peak / memory:.2f}",
    )
    waits = max(time.data - time.compute - time.communication - time.optimizer, 0)
    table.add_row("s/step waiting for data", f"{waits:.3g}", f"{measured.data_wait_seconds:.3g}", "")
    return table
