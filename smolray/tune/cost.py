"""Cost estimates of trials by the planner: whether a trial fits into the GPUs of the cluster, and what it costs.

In: a trial's settings, the statistics of the data set, the kinds of GPUs in the cluster. Out: a CostEstimate.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from smolray.config import RunConfig
from smolray.data.ray_jobs import load_index
from smolray.data.reader import Folders
from smolray.launch.resources import use_gpu
from smolray.planner.candidate import Candidate
from smolray.planner.candidates import candidate_as_written
from smolray.planner.gpus import GPU
from smolray.planner.inventory import PCIE, Inventory, InventoryError, InventoryNode, find_gpu
from smolray.planner.model_files import shape_of
from smolray.planner.problem import PlanningProblem
from smolray.planner.shapes import ModelShape
from smolray.planner.statistics import DataStatistics
from smolray.tune.domain import Settings
from smolray.tune.space import trial_run

ACCELERATOR = "accelerator_type:"  # before the name of a GPU among Ray's resources


@dataclass(frozen=True)
class CostEstimate:
    """The estimated cost of a trial.

    Attributes:
        gpu_minutes: of training, on the kind of GPU where it is cheapest.
        lacks: why it does not fit into any GPU; empty where it fits.
    """

    gpu_minutes: float
    lacks: str = ""


CostEstimator = Callable[[Settings], CostEstimate | None]


def make_cost_estimator(base: RunConfig, folders: Folders, nodes: Sequence[dict[str, Any]]) -> CostEstimator:
    """A function that estimates the cost of a trial on the GPUs of `nodes`, as ray.nodes() lists them.

    It returns None without GPUs, and where the planner does not know one of them: the trial may fit there.
    """
    try:
        gpus = _gpus(nodes)
    except InventoryError:
        gpus = []
    if not gpus or not use_gpu(base, {"GPU": len(gpus)}):
        return lambda settings: None

    statistics = DataStatistics.from_index(load_index(folders.train, base), base.data.repeats)

    def cost_of(settings: Settings) -> CostEstimate | None:
        run = trial_run(base, settings)
        shape = shape_of(run.model)
        if (run.image, run.data, run.model.path) == (base.image, base.data, base.model.path):
            return estimate_cost(run, shape, statistics, gpus)
        # this trial has other tiles or tokens than the index
        return estimate_cost(run, shape, replace(DataStatistics.default(run, shape), samples=statistics.samples), gpus)

    return cost_of


def estimate_cost(
    config: RunConfig, shape: ModelShape, statistics: DataStatistics, gpus: Sequence[GPU]
) -> CostEstimate | None:
    """The cost of a trial as its config is written, with all workers on GPUs of one kind. Pure.

    None where the planner has no estimate: without GPUs, or for an engine that it does not plan.
    """
    kinds = dict.fromkeys(gpus)
    found = [candidate for gpu in kinds if (candidate := _on(config, shape, statistics, gpu)) is not None]
    if not found:
        refused = [reason for gpu in kinds if (reason := gpu.cannot_run(config.model.dtype))]
        return CostEstimate(0.0, refused[0]) if refused and len(refused) == len(kinds) else None

    fitting = [candidate for candidate in found if candidate.fits]
    if not fitting:
        nearest = min(found, key=lambda candidate: candidate.missing)
        return CostEstimate(
            0.0, f"does not fit: {nearest.limit}, micro-batch {nearest.micro_batch}, on {nearest.names[0]}"
        )

    samples = (statistics.samples or 0) * config.train.num_train_epochs
    if config.train.max_steps > 0:
        samples = config.train.max_steps * config.global_batch * config.train.per_device_train_batch_size
    return CostEstimate(round(min(samples / c.samples_per_second * len(c.gpus) / 60 for c in fitting), 2))


def _gpus(nodes: Sequence[dict[str, Any]]) -> list[GPU]:
    """The GPU of each living node that has some. Raises InventoryError for a kind that the planner does not know."""
    found: list[GPU] = []
    for node in nodes:
        resources = node["Resources"]
        kinds = [name.removeprefix(ACCELERATOR) for name in resources if name.startswith(ACCELERATOR)]
        if node["Alive"] and kinds and resources.get("GPU", 0) > 0:
            found.append(find_gpu(kinds[0]))
    return found


def _on(config: RunConfig, shape: ModelShape, statistics: DataStatistics, gpu: GPU) -> Candidate | None:
    fraction = min(1.0, config.resources.gpus_per_worker)
    gpus = (replace(gpu, memory=int(gpu.memory * fraction)),) * config.resources.workers[0]
    node = InventoryNode("trial", gpus, PCIE)
    return candidate_as_written(PlanningProblem(config, shape, statistics, Inventory((node,))))
