"""What a trial would need, as the planner sees it: whether it fits into the cards that are there, and what it costs.

In: a trial's RunConfig, the statistics of the data set, the kinds of cards in the cluster. Out: a Price. Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from smolray.config import RunConfig
from smolray.planner.candidates import Candidate, Search
from smolray.planner.inventory import PCIE, Box, Card, Inventory
from smolray.planner.plan import written
from smolray.planner.shapes import ModelShape
from smolray.planner.statistics import DataStatistics


@dataclass(frozen=True)
class Price:
    """`gpu_minutes`: of training, on the kind of card where it is cheapest; `lacks`: why it fits into none, empty where
    it fits.
    """

    gpu_minutes: float
    lacks: str = ""


def price(config: RunConfig, shape: ModelShape, statistics: DataStatistics, cards: Sequence[Card]) -> Price | None:
    """The price of a trial as it is written, its workers on cards of one kind.

    None: the planner has no say (no cards, another engine).
    """
    found = [
        candidate for card in dict.fromkeys(cards) if (candidate := _on(config, shape, statistics, card)) is not None
    ]
    if not found:
        return None
    fitting = [candidate for candidate in found if candidate.fits]
    if not fitting:
        nearest = min(found, key=lambda c: c.missing)
        return Price(0.0, f"does not fit: {nearest.limit}, micro-batch {nearest.micro_batch}, on {nearest.names[0]}")
    samples = (statistics.samples or 0) * config.train.num_train_epochs
    return Price(round(min(samples / c.samples_per_second * len(c.cards) / 60 for c in fitting), 2))


def _on(config: RunConfig, shape: ModelShape, statistics: DataStatistics, card: Card) -> Candidate | None:
    share = min(1.0, config.resources.gpus_per_worker)
    box = Box("trial", (replace(card, memory=int(card.memory * share)),) * config.resources.workers[0], PCIE)
    return written(Search(config, shape, statistics, Inventory((box,))))
