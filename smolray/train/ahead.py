"""A worker's micro-batches, step by step; the next step's first one is on its way to the GPU before the last one ends.

In: the micro-batches of a stream. Out: those of a step. Without it the GPU would be idle between two steps, while the
next micro-batch is read, pinned and copied.
"""

from collections.abc import Iterable, Iterator
from itertools import islice

import torch

from smolray.data.batch import Batch


class BatchesAhead:
    """Micro-batches in their order. `device`: where the next one is brought to ahead of time; None: nothing is."""

    def __init__(self, batches: Iterable[Batch], device: torch.device | None):
        self._batches, self._device = iter(batches), device
        self._next: Batch | None = None

    def take(self, count: int) -> Iterator[Batch]:
        """The next `count`, or what is left. Asked for one more, when all work on them is launched, it reads ahead."""
        if count and self._next is not None:
            count -= 1
            first, self._next = self._next, None
            yield first
        yield from islice(self._batches, count)

        if self._device is not None and self._next is None and (following := next(self._batches, None)) is not None:
            self._next = following.to(self._device)
