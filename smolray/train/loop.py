"""The training loop: plan -> stream -> accumulate -> check -> step -> hooks, the same for every engine.

In: an engine, the epoch plans and a stream for each epoch. Out: trained weights, events, checkpoints. Every worker runs
it; what is written is written by rank 0. It knows nothing of Ray.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Protocol

import torch
import torch.distributed as dist

from smolray.config import RunConfig
from smolray.data.batch import Batch
from smolray.data.plan import EpochPlan
from smolray.engine.base import Engine, LocalSums, NonFiniteLossError
from smolray.engine.optim import schedule
from smolray.objectives.base import Normalisers
from smolray.run.checkpoint import Progress
from smolray.train.balance import MicroBatchBalancer

STOP_POLL_SECONDS = 2.0


class BatchStream(Protocol):
    """A worker's micro-batches of an epoch, and the seconds its consumer stood still for them."""

    wait_seconds: float

    def __iter__(self) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step over all workers.

    Losses and metrics are means over the trained tokens (DPO: the pairs) of the step.
    """

    step: int
    total_steps: int
    position: tuple[int, int]  # (epoch, micro-batches of it consumed) after this step
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    samples: int
    tokens: int
    label_tokens: int
    seconds: float
    data_wait_seconds: float  # mean over workers
    memory_bytes: int  # peak of the busiest worker
    skipped: bool = False
    loss_scale: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)  # of the objective


@dataclass
class StepInfo:
    """What a hook sees after a step.

    `local` and `numbers` are this worker's; everything else is the same on every worker.
    """

    progress: Progress
    metrics: StepMetrics
    local: LocalSums
    end_of_epoch: bool
    last: bool
    stopping: bool


Hook = Callable[[StepInfo], None]


@dataclass
class TrainLoop:
    """`stop_requested` is asked on rank 0 every two seconds; the answer reaches all workers with the step's sums."""

    config: RunConfig
    engine: Engine
    plans: Sequence[EpochPlan]
    open_stream: Callable[[EpochPlan, Sequence[int]], BatchStream]
    progress: Progress
    hooks: Sequence[Hook] = ()
    stop_requested: Callable[[], bool] = lambda: False
    balancer: MicroBatchBalancer | None = None  # default: equal shares
    _polled: float = field(default=0.0, init=False)

    @property
    def total_steps(self) -> int:
        steps = sum(plan.steps(self.config.global_batch) for plan in self.plans)
        limit = self.config.train.max_steps
        return min(steps, limit) if limit > 0 else steps

    def run(self) -> Progress:
        """Train to the end or to a stop. Raises NonFiniteLossError before the weights are touched by a bad step."""
        rate = schedule(self.config.optimizer, self.total_steps)
        for step_info in self._steps(rate):
            for hook in self.hooks:
                hook(step_info)
            if step_info.stopping or step_info.last:
                break
        return self.progress

    def _steps(self, rate: Callable[[int], float]) -> Iterator[StepInfo]:
        balancer, size = self.balancer or MicroBatchBalancer(*self.engine.data_parallel), self.config.global_batch
        for epoch in range(self.progress.epoch, len(self.plans)):
            plan = self.plans[epoch]
            starts = range(self.progress.consumed, len(plan), size)
            if not starts or self.progress.step >= self.total_steps:
                continue
            self.engine.epoch = epoch
            for span in balancer.spans([range(s, min(s + size, len(plan))) for s in starts]):
                yield from self._span(epoch, span, balancer, rate)

    def _span(
        self, epoch: int, steps: Sequence[range], balancer: MicroBatchBalancer, rate: Callable[[int], float]
    ) -> Iterator[StepInfo]:
        """Steps of one epoch through one stream."""
        plan = self.plans[epoch]
        stream = self.open_stream(plan, [n for run in steps for n in balancer.share(run)])
        batches = iter(stream)
        for run in steps:
            began, waited = time.perf_counter(), stream.wait_seconds
            normalisers = normalisers_of(plan, run)
            local = self.engine.accumulate(
                islice(batches, len(balancer.share(run))), max(balancer.counts(len(run))), normalisers
            )
            waited = stream.wait_seconds - waited
            sums = self._reduce(local, waited)
            loss = sums["loss"]
            if not torch.isfinite(torch.tensor(loss)):
                raise NonFiniteLossError(
                    f"loss is {loss} at step {self.progress.step + 1} (epoch {epoch}, micro-batches {run.start}..{run.stop - 1}); "
                    "the optimizer has not stepped; lower optimizer.learning_rate or look at the data"
                )
            learning_rate = rate(self.progress.step)
            result = self.engine.step(learning_rate)
            self._advance(epoch, run, int(sums["samples"]), int(sums["tokens"]), result.skipped)
            metrics = StepMetrics(
                step=self.progress.step,
                total_steps=self.total_steps,
                position=(epoch, run.stop),
                epoch=epoch + run.stop / len(plan),
                loss=loss,
                metrics={name: sums[name] for name in self.engine.objective.metrics},
                grad_norm=result.grad_norm,
                learning_rate=learning_rate,
                samples=int(sums["samples"]),
                tokens=int(sums["tokens"]),
                label_tokens=normalisers.label_tokens,
                seconds=time.perf_counter() - began,
                data_wait_seconds=sums["waited"] / dist.get_world_size(),
                memory_bytes=int(sums["memory"]),
                skipped=result.skipped,
                loss_scale=result.loss_scale,
            )
            yield StepInfo(
                self.progress,
                metrics,
                local,
                end_of_epoch=run.stop == len(plan),
                stopping=sums["stop"] > 0,
                last=self.progress.step >= self.total_steps or (run.stop == len(plan) and epoch == len(self.plans) - 1),
            )
            balancer.observe(local.tokens, local.seconds - waited, len(run), self.engine.device)

    def _reduce(self, local: LocalSums, waited: float) -> dict[str, float]:
        """Sums over all workers (the peak memory: maximum), in two small collectives a step."""
        names = ("loss", "samples", "tokens", "waited", "stop", *self.engine.objective.metrics)
        values = [local.loss, local.samples, local.tokens, waited, float(self._poll()), *local.metrics]
        sums = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.engine.device) for v in values])
        dist.all_reduce(sums)
        memory = torch.tensor(
            [float(peak_memory_bytes(self.engine.device))], dtype=torch.float64, device=self.engine.device
        )
        dist.all_reduce(memory, op=dist.ReduceOp.MAX)
        return dict(zip(names, sums.tolist(), strict=True)) | {"memory": memory.item()}

    def _poll(self) -> bool:
        if dist.get_rank() or time.monotonic() - self._polled < STOP_POLL_SECONDS:
            return False
        self._polled = time.monotonic()
        return self.stop_requested()

    def _advance(self, epoch: int, run: range, samples: int, tokens: int, skipped: bool) -> None:
        """An overflowed fp16 step consumes its samples and does not advance the schedule."""
        done = run.stop == len(self.plans[epoch])
        self.progress = replace(
            self.progress,
            step=self.progress.step + (not skipped),
            epoch=epoch + done,
            consumed=0 if done else run.stop,
            samples=self.progress.samples + samples,
            tokens=self.progress.tokens + tokens,
        )


def normalisers_of(plan: EpochPlan, run: range) -> Normalisers:
    """The divisors of the step that trains `run`, known before it starts."""
    part = slice(run.start, run.stop)
    return Normalisers(plan.samples_in(run), int(plan.label_tokens[part].sum()), int(plan.chosen_tokens[part].sum()))


def peak_memory_bytes(device: torch.device) -> int:
    """Peak bytes: of the CUDA allocator on a GPU, of the resident process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def metrics_fields(metrics: StepMetrics) -> dict[str, Any]:
    """The fields of a `step` event (run/events.py)."""
    fields = {k: v for k, v in metrics.__dict__.items() if k != "metrics"}
    return fields | metrics.metrics
