"""When further training is not worth it: evaluations that do not get better.

In: the headline of each evaluation, those of earlier attempts from the log. Out: whether the run is to finish. It
depends on the surviving history alone, so a resumed run stops where an uninterrupted one does.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from smolray.run.events import Event


@dataclass
class EarlyStopping:
    """Counts evaluations in a row that are not better, by more than `threshold`, than the best before them."""

    patience: int | None
    threshold: float = 0.0
    best: float | None = field(default=None, init=False)
    worse: int = field(default=0, init=False)

    @property
    def reached(self) -> bool:
        """Whether the run is to finish."""
        return self.patience is not None and self.worse >= self.patience

    def add(self, value: float) -> None:
        """Count one evaluation; higher is better."""
        better = self.best is None or value > self.best + self.threshold
        self.best, self.worse = (value, 0) if better else (self.best, self.worse + 1)

    def add_history(self, values: Iterable[float]) -> "EarlyStopping":
        """Count those of earlier attempts, in order."""
        for value in values:
            self.add(value)
        return self


def evaluations_of(history: Iterable[Event], before: int) -> list[float]:
    """The headlines of the evaluated checkpoints before a step, from the surviving history."""
    return [e["accuracy"] for e in history if e["event"] == "checkpoint" and "accuracy" in e and e["step"] < before]
