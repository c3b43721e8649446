"""Which conversations are trained, and how often in an epoch, where the data have several sources.

In: the index, and how often the conversations of each source are trained in an epoch. Out: a number for each
conversation and epoch. Over several epochs every conversation of a source has its turn equally often, to one.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa


def kept(index: pa.Table) -> np.ndarray:
    """Which conversations are trained: (index rows,) bool."""
    return (index["tokens"].to_numpy() > 0) & (index["label_tokens"].to_numpy() > 0)  # type: ignore[no-any-return]


def source_numbers(index: pa.Table) -> np.ndarray:
    """The number of each conversation's source: (index rows,) int. An index of one source may not say it."""
    return index["source"].to_numpy() if "source" in index.column_names else np.zeros(len(index), np.int32)


def kept_of_sources(index: pa.Table, sources: int) -> list[int]:
    """How many conversations of each source are trained."""
    return [int(n) for n in np.bincount(source_numbers(index)[kept(index)], minlength=sources)]


class Repeats:
    """The counts of a run. `whole`: every epoch has the same."""

    def __init__(self, index: pa.Table, repeats: Sequence[float], seed: int):
        self.repeats = repeats
        self.whole = all(float(number).is_integer() for number in repeats)
        sources = np.where(kept(index), source_numbers(index), -1)
        self._rows = [np.flatnonzero(sources == source) for source in range(len(repeats))]
        self._turns = [np.random.default_rng([seed, n]).permutation(len(rows)) for n, rows in enumerate(self._rows)]
        self._length = len(index)

    def counts(self, epoch: int) -> np.ndarray:
        """How often each conversation is trained in an epoch: (index rows,) int64."""
        counts = np.zeros(self._length, np.int64)
        for rows, turns, repeats in zip(self._rows, self._turns, self.repeats, strict=True):
            if not len(rows):
                continue
            # Hermite's identity: over all turns the floors of (x + turn / n) add up to the floor of n x.
            before, after = (round(len(rows) * repeats * number) for number in (epoch, epoch + 1))
            counts[rows] = (after + turns) // len(rows) - (before + turns) // len(rows)
        return counts
