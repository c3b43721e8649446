"""Micro-batches of a step dealt to workers: as many to each, or as many as its card takes in the time of the others.

In: what each worker did in the first steps. Out: counts for every step from then on, the same on all workers. Losses
and gradients do not depend on them.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from smolray.data.plan import share
from smolray.planner.schedule import balance

WARM_UP, MEASURED = 2, 4  # steps: left aside, and timed
ALIKE = 0.1  # speeds that differ by less are taken as equal

Heard = Callable[[Sequence[float], Sequence[int]], None]


@dataclass
class MicroBatchBalancer:
    """`measure`: time the first steps, of equal shares, and deal by speed after them.

    `heard` is then told speeds and the shares of a whole step.
    """

    rank: int
    world: int
    measure: bool = False
    heard: Heard = lambda speeds, shares: None
    speeds: tuple[float, ...] = ()  # micro-batches a second, relative
    _seen: list[float] = field(default_factory=list, init=False)  # this worker's tokens a second
    _steps: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.speeds = self.speeds or (1.0,) * self.world
        self.measure = self.measure and self.world > 1

    def counts(self, micro_batches: int) -> tuple[int, ...]:
        """Of a step of so many, for each worker."""
        return balance(self.speeds, micro_batches)

    def share(self, step: range) -> range:
        """The micro-batches of a step that fall to this worker."""
        return share(step, self.rank, self.counts(len(step)))

    def spans(self, steps: Sequence[range]) -> Iterator[Sequence[range]]:
        """The steps of an epoch in one or two runs; shares do not change within a run."""
        first = WARM_UP + MEASURED - self._steps if self.measure else 0
        if first:
            yield steps[:first]
        if len(steps) > first:
            yield steps[first:]

    def observe(self, tokens: int, seconds: float, step: int, device: torch.device) -> None:
        """What this worker did in a step of `step` micro-batches. Collective after the last that is timed."""
        if not self.measure:
            return
        self._steps += 1
        if self._steps > WARM_UP and tokens and seconds > 0:
            self._seen.append(tokens / seconds)
        if self._steps == WARM_UP + MEASURED:
            self.measure = False
            speeds = torch.zeros(self.world, dtype=torch.float64, device=device)
            speeds[self.rank] = statistics.median(self._seen) if self._seen else 0.0
            dist.all_reduce(speeds)
            if float(speeds.min()) and float(speeds.max() / speeds.min()) > 1 + ALIKE:
                self.speeds = tuple((speeds / speeds.mean()).tolist())
            self.heard(speeds.tolist(), self.counts(step))
