"""What a trial would need, as the planner sees it: whether it fits into the cards that are there, and what it costs.

In: a trial's RunConfig, the statistics of the data set, the kinds of cards in the cluster. Out: a Price. Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from smolray.config import RunConfig
from smolray.planner.candidate import Candidate
from smolray.planner.candidates import candidate_as_written
from smolray.planner.inventory import GPU, PCIE, Inventory, InventoryNode
from smolray.planner.problem import PlanningProblem
from smolray.planner.shapes import ModelShape
from smolray.planner.statistics import DataStatistics


@dataclass(frozen=True)
class CostEstimate:
    """`gpu_minutes`: of training, on the kind of card where it is cheapest; `lacks`: why it fits into none, empty where
    it fits.
    """

    gpu_minutes: float
    lacks: str = ""


def estimate_cost(
    config: RunConfig, shape: ModelShape, statistics: DataStatistics, gpus: Sequence[GPU]
) -> CostEstimate | None:
    """The price of a trial as it is written, its workers on cards of one kind.

    None: the planner has no say (no cards, another engine).
    """
    found = [candidate for gpu in dict.fromkeys(gpus) if (candidate := _on(config, shape, statistics, gpu)) is not None]
    if not found:
        return None
    fitting = [candidate for candidate in found if candidate.fits]
    if not fitting:
        nearest = min(found, key=lambda c: c.missing)
        return CostEstimate(
            0.0, f"does not fit: {nearest.limit}, micro-batch {nearest.micro_batch}, on {nearest.names[0]}"
        )
    samples = (statistics.samples or 0) * config.train.num_train_epochs
    return CostEstimate(round(min(samples / c.samples_per_second * len(c.gpus) / 60 for c in fitting), 2))


def _on(config: RunConfig, shape: ModelShape, statistics: DataStatistics, gpu: GPU) -> Candidate | None:
    share = min(1.0, config.resources.gpus_per_worker)
    box = InventoryNode("trial", (replace(gpu, memory=int(gpu.memory * share)),) * config.resources.workers[0], PCIE)
    return candidate_as_written(PlanningProblem(config, shape, statistics, Inventory((box,))))
