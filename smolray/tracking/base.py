"""The interface of a tracker, and what it is told.

In: a run's settings, points of its curves, samples and checkpoints. Out: calls of one tracker's library.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run before its first point. Runs of one `group` are shown together."""

    name: str
    run_dir: str
    settings: dict[str, Any]
    group: str = ""

    def flat_settings(self) -> dict[str, Any]:
        """The settings by dotted key; sections that are off are left out."""
        return dict(_flat("", self.settings))


@dataclass(frozen=True)
class Point:
    """The values of one step, by name."""

    step: int
    time: float  # seconds since 1970
    values: dict[str, float]


@dataclass(frozen=True)
class Sample:
    """An answered validation question. `image`: the bytes of its image file; None where it has none."""

    question: str
    answer: str
    prediction: str
    correct: bool
    image: bytes | None = None


class Tracker(Protocol):
    """One tracker's library. All methods are called in one thread; what they raise is told, and tried again later."""

    def start(self, run: TrackedRun, known: str) -> tuple[str, str]:
        """Begin, or continue the run that this tracker knows as `known` (empty: none yet).

        Returns the id under which to continue, and where people find the run.
        """
        ...

    def log(self, points: Sequence[Point]) -> None:
        """Add points to the curves."""
        ...

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Show answered questions of the evaluation at `step`, with their images."""
        ...

    def checkpoint(self, step: int, uri: str) -> None:
        """Name the newest checkpoint."""
        ...

    def end(self, status: str) -> None:
        """End with the status of the run: finished, stopped or failed."""
        ...


def _flat(prefix: str, settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{name}.", value)
        elif value is not None:
            yield f"{prefix}{name}", value if isinstance(value, int | float | str) else str(value)
