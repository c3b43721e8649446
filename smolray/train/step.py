"""The report of one optimizer step: its metrics over all workers, and the StepInfo for the hooks of the training loop.

In: the sums of each worker. Out: StepMetrics and StepInfo, the same for our loop and for TRL's trainer.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from smolray.engine.base import LocalSums
from smolray.run.checkpoint import Progress

STOP_POLL_SECONDS = 2.0


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step over all workers.

    The loss and the metrics of the objective are means over the trained tokens of the step (DPO: over its pairs).
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


@dataclass(frozen=True)
class StepInfo:
    """What a hook sees after a step. `local` is of this worker; all else is the same on every worker."""

    progress: Progress
    metrics: StepMetrics
    local: LocalSums
    end_of_epoch: bool
    last: bool
    stopping: bool


Hook = Callable[[StepInfo], None]


@dataclass
class StopPoll:
    """Whether the run is requested to stop. Only rank 0 looks, and at most every STOP_POLL_SECONDS.

    The answer reaches the other workers with the sums of the step (`sum_over_workers`).
    """

    requested: Callable[[], bool]
    _polled: float = field(default=-math.inf, init=False)

    def __call__(self) -> bool:
        now = time.monotonic()
        if dist.get_rank() or now - self._polled < STOP_POLL_SECONDS:
            return False
        self._polled = now
        return self.requested()


def sum_over_workers(numbers: Mapping[str, float | torch.Tensor], device: torch.device) -> dict[str, float]:
    """Each number summed over all workers, and `memory`: the peak bytes of the busiest worker. Collective.

    One all-reduce, one copy to the device and one back: each worker adds its peak in a place of its own. They run in
    every step, whether it is logged or not: the loss decides if the optimizer may step, and a request to stop must
    reach all workers in the same step.
    """
    there = {name: number for name, number in numbers.items() if isinstance(number, torch.Tensor)}
    here = {name: float(number) for name, number in numbers.items() if name not in there}
    peaks = [0.0] * dist.get_world_size()
    peaks[dist.get_rank()] = float(peak_memory_bytes(device))

    values = torch.tensor([*here.values(), *peaks], dtype=torch.float64)
    if device.type == "cuda":
        values = values.pin_memory().to(device, non_blocking=True)
    sums = torch.cat([values, *(number.reshape(1).double() for number in there.values())])
    dist.all_reduce(sums)
    found = sums.tolist()
    of_workers = found[len(here) : len(values)]
    return dict(zip([*here, *there], found[: len(here)] + found[len(values) :], strict=True)) | {
        "memory": max(of_workers)
    }


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
