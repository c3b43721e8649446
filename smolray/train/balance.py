"""Load balancing: how many micro-batches of a step each worker takes.

In: the speed of each worker in the first steps. Out: counts for every later step, the same on all workers; faster
workers take more. Losses and gradients do not depend on them.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from smolray.data.plan import share
from smolray.planner.schedule import balance

WARM_UP, MEASURED = 2, 4  # steps: not timed, and timed
ALIKE = 0.1  # speeds that differ by less count as equal

# (tokens per second, micro-batches of a step) of each worker
OnBalanced = Callable[[Sequence[float], Sequence[int]], None]


@dataclass
class MicroBatchBalancer:
    """The micro-batches of one worker, `rank` of `world`.

    `measure`: time the first steps with equal counts, then balance by speed and call `on_balanced`.
    """

    rank: int
    world: int
    measure: bool = False
    on_balanced: OnBalanced = lambda speeds, counts: None
    speeds: tuple[float, ...] = ()  # micro-batches per second, relative
    _seen: list[float] = field(default_factory=list, init=False)  # this worker's tokens per second
    _steps: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.speeds = self.speeds or (1.0,) * self.world
        self.measure = self.measure and self.world > 1

    def counts(self, micro_batches: int) -> tuple[int, ...]:
        """How many micro-batches each worker takes of a step that has `micro_batches`."""
        return balance(self.speeds, micro_batches)

    def own(self, window: range) -> range:
        """The micro-batches of a step that this worker takes."""
        return share(window, self.rank, self.counts(len(window)))

    def spans(self, windows: Sequence[range]) -> Iterator[Sequence[range]]:
        """The steps of an epoch in one or two parts; counts do not change within a part."""
        first = WARM_UP + MEASURED - self._steps if self.measure else 0
        if first:
            yield windows[:first]
        if len(windows) > first:
            yield windows[first:]

    def observe(self, tokens: int, seconds: float, micro_batches: int, device: torch.device) -> None:
        """Note what this worker did in a step of `micro_batches`. Collective after the last step that is timed."""
        if not self.measure:
            return

        self._steps += 1
        if self._steps > WARM_UP and tokens and seconds > 0:
            self._seen.append(tokens / seconds)
        if self._steps == WARM_UP + MEASURED:
            self._balance(micro_batches, device)

    def _balance(self, micro_batches: int, device: torch.device) -> None:
        self.measure = False
        speeds = torch.zeros(self.world, dtype=torch.float64, device=device)
        speeds[self.rank] = statistics.median(self._seen) if self._seen else 0.0
        dist.all_reduce(speeds)

        if float(speeds.min()) and float(speeds.max() / speeds.min()) > 1 + ALIKE:
            self.speeds = tuple((speeds / speeds.mean()).tolist())
        self.on_balanced(speeds.tolist(), self.counts(micro_batches))
