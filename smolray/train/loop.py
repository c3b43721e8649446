"""The training loop: plan -> stream -> accumulate -> check -> step -> hooks, the same for every engine.

In: an engine, the epoch plans and a stream for each epoch. Out: trained weights, and a StepInfo for the hooks after
each step. Every worker runs it. It knows nothing of Ray.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch.distributed as dist

from smolray.config import RunConfig
from smolray.data.batch import Batch
from smolray.data.plan import EpochPlan
from smolray.engine.base import Engine, LocalSums, NonFiniteGradientError, StepResult
from smolray.engine.optim import schedule
from smolray.objectives.base import Normalisers
from smolray.run.checkpoint import Progress
from smolray.train.ahead import BatchesAhead
from smolray.train.balance import MicroBatchBalancer
from smolray.train.refusal import NonFiniteStepError, refused_step
from smolray.train.step import Hook, StepInfo, StepMetrics, StopPoll, sum_over_workers

LearningRate = Callable[[int], float]  # of the steps that are done


class BatchStream(Protocol):
    """This worker's micro-batches of an epoch, and the seconds that training has waited for them."""

    wait_seconds: float

    def __iter__(self) -> Iterator[Batch]: ...


@dataclass
class TrainLoop:
    """Trains from `progress` to the end of the plans, or until a stop is requested.

    `open_stream`: this worker's micro-batches of an epoch, by their numbers in its plan.
    `total_steps`: `train.max_steps`, else the steps of all epochs; by default counted from the plans.
    `enough`: looked at after the hooks of each step; the same on every worker.
    `balancer`: by default every worker takes the same number of micro-batches.
    """

    config: RunConfig
    engine: Engine
    plans: Sequence[EpochPlan]
    open_stream: Callable[[EpochPlan, Sequence[int]], BatchStream]
    progress: Progress
    hooks: Sequence[Hook] = ()
    stop_requested: Callable[[], bool] = lambda: False
    enough: Callable[[], bool] = lambda: False
    balancer: MicroBatchBalancer | None = None
    total_steps: int = 0

    def __post_init__(self) -> None:
        self._stop = StopPoll(self.stop_requested)
        if not self.total_steps:
            limit = self.config.train.max_steps
            self.total_steps = limit if limit > 0 else sum(p.steps(self.config.global_batch) for p in self.plans)

    def run(self) -> Progress:
        """Train to the end or to a stop. Raises NonFiniteStepError before the weights are touched by a bad step."""
        for step_info in self._steps():
            for hook in self.hooks:
                hook(step_info)
            if step_info.stopping or step_info.last or self.enough():
                break
        return self.progress

    def _steps(self) -> Iterator[StepInfo]:
        """The steps that are left, over all epochs."""
        balancer = self.balancer or MicroBatchBalancer(*self.engine.data_parallel)
        learning_rate = schedule(self.config.optimizer, self.total_steps)
        size = self.config.global_batch

        for epoch in range(self.progress.epoch, len(self.plans)):
            if self.progress.step >= self.total_steps:
                return
            plan = self.plans[epoch]
            starts = range(self.progress.consumed, len(plan), size)
            self.engine.epoch = epoch
            for windows in balancer.spans([range(s, min(s + size, len(plan))) for s in starts]):
                yield from self._span(epoch, windows, balancer, learning_rate)

    def _span(
        self, epoch: int, windows: Sequence[range], balancer: MicroBatchBalancer, learning_rate: LearningRate
    ) -> Iterator[StepInfo]:
        """Successive steps of one epoch through one stream; a window is the micro-batches of one step."""
        plan = self.plans[epoch]
        stream = self.open_stream(plan, [number for window in windows for number in balancer.own(window)])
        early = self.engine.one_by_one and self.engine.device.type == "cuda"
        batches = BatchesAhead(stream, self.engine.device if early else None)

        for window in windows:
            began, waited_before = time.perf_counter(), stream.wait_seconds

            # The divisors of the means are known beforehand, so every worker's contributions simply add up.
            normalisers = normalisers_of(plan, window)
            own = batches.take(len(balancer.own(window)))
            local = self.engine.accumulate(own, max(balancer.counts(len(window))), normalisers)

            waited = stream.wait_seconds - waited_before
            sums = self._sum(local, waited)
            if not math.isfinite(sums["loss"]):
                raise self._refused(f"the loss is {sums['loss']}", epoch, window, local)

            rate = learning_rate(self.progress.step)
            try:
                result = self.engine.step(rate)
            except NonFiniteGradientError as error:
                raise self._refused(str(error), epoch, window, local) from None
            self._advance(epoch, window, sums, result.skipped)

            seconds = time.perf_counter() - began
            metrics = self._metrics(epoch, window, sums, normalisers, result, rate, seconds)
            yield self._info(epoch, window, metrics, local, stopping=sums["stop"] > 0)
            balancer.observe(local.tokens, local.seconds - waited, len(window), self.engine.device)

    def _sum(self, local: LocalSums, waited: float) -> dict[str, float]:
        """The numbers of a step over all workers. Collective."""
        numbers = {
            "loss": local.loss,
            "samples": local.samples,
            "tokens": local.tokens,
            "waited": waited,
            "stop": float(self._stop()),
            **dict(zip(self.engine.objective.metrics, local.metrics, strict=True)),
        }
        return sum_over_workers(numbers, self.engine.device)

    def _refused(self, what: str, epoch: int, window: range, local: LocalSums) -> NonFiniteStepError:
        """The error of a step that is refused while the weights are still good. Collective."""
        place = f"epoch {epoch}, micro-batches {window.start}..{window.stop - 1}"
        ids = [one for _, own in local.ids for one in own]
        return refused_step(self.config, what, self.progress.step + 1, place, ids, float(local.loss))

    def _advance(self, epoch: int, window: range, sums: dict[str, float], skipped: bool) -> None:
        """An overflowed fp16 step consumes its samples and does not advance the schedule."""
        done = window.stop == len(self.plans[epoch])
        self.progress = replace(
            self.progress,
            step=self.progress.step + (not skipped),
            epoch=epoch + done,
            consumed=0 if done else window.stop,
            samples=self.progress.samples + int(sums["samples"]),
            tokens=self.progress.tokens + int(sums["tokens"]),
        )

    def _metrics(
        self,
        epoch: int,
        window: range,
        sums: dict[str, float],
        normalisers: Normalisers,
        result: StepResult,
        learning_rate: float,
        seconds: float,
    ) -> StepMetrics:
        return StepMetrics(
            step=self.progress.step,
            total_steps=self.total_steps,
            position=(epoch, window.stop),
            epoch=epoch + window.stop / len(self.plans[epoch]),
            loss=sums["loss"],
            metrics={name: sums[name] for name in self.engine.objective.metrics},
            grad_norm=result.grad_norm,
            learning_rate=learning_rate,
            samples=int(sums["samples"]),
            tokens=int(sums["tokens"]),
            label_tokens=normalisers.label_tokens,
            seconds=seconds,
            data_wait_seconds=sums["waited"] / dist.get_world_size(),
            memory_bytes=int(sums["memory"]),
            skipped=result.skipped,
            loss_scale=result.loss_scale,
        )

    def _info(self, epoch: int, window: range, metrics: StepMetrics, local: LocalSums, stopping: bool) -> StepInfo:
        end_of_epoch = window.stop == len(self.plans[epoch])
        end_of_plans = end_of_epoch and epoch == len(self.plans) - 1
        last = end_of_plans or self.progress.step >= self.total_steps
        return StepInfo(self.progress, metrics, local, end_of_epoch, last, stopping)


def normalisers_of(plan: EpochPlan, window: range) -> Normalisers:
    """The divisors of the means of a step, known before it starts."""
    part = slice(window.start, window.stop)
    return Normalisers(plan.samples_in(window), int(plan.label_tokens[part].sum()), int(plan.chosen_tokens[part].sum()))
