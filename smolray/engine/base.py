"""The interface of an engine: one optimizer step over a worker's micro-batches, and the state by parameter name.

In: a model, an objective, batches. Out: LocalSums, StepResult, EngineState. An engine needs an initialised process
group and nothing of Ray: it runs under plain `torchrun` as well.
"""

import hashlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn

from smolray.config import RunConfig
from smolray.data.batch import Batch
from smolray.objectives.base import Normalisers, Objective
from smolray.run.state import EngineState


class NonFiniteGradientError(RuntimeError):
    """The norm of the gradient is nan or infinite, on every worker; the optimizer has not stepped."""


@dataclass(frozen=True)
class LocalSums:
    """Sums over one worker's micro-batches of a step."""

    loss: torch.Tensor  # () float64, on the device: this worker's contribution to the step's loss
    metrics: torch.Tensor  # (metrics of the objective,) float64: its contributions to those
    samples: int = 0
    tokens: int = 0  # padding left out
    ids: tuple[tuple[int, tuple[str, ...]], ...] = ()  # (micro-batch, its sample ids)
    # until its own gradients were ready; waiting for data is included, waiting for other workers is not
    seconds: float = 0.0


@dataclass(frozen=True)
class StepResult:
    """The outcome of an optimizer step."""

    grad_norm: float  # of the mean loss over the step's tokens, before clipping
    skipped: bool = False  # fp16 overflow: the samples are consumed, the weights unchanged
    loss_scale: float | None = None


class Engine(Protocol):
    """One optimizer step over the micro-batches of a worker. All methods are called by every worker."""

    model: nn.Module
    objective: Objective
    device: torch.device
    epoch: int  # set by the loop; keys the dropout
    data_parallel: tuple[int, int]  # (this worker's rank, their number) among the workers with different micro-batches
    sees_images: bool  # whether this worker reads the pixels of its micro-batches
    one_by_one: bool  # whether `accumulate` asks for a micro-batch when the work on the one before is launched

    def accumulate(self, batches: Iterable[Batch], forwards: int, normalisers: Normalisers) -> LocalSums:
        """Forward and backward passes of a step; gradients are summed over all workers.

        Args:
            batches: this worker's micro-batches.
            forwards: the most micro-batches of any worker in this step, for engines whose forward passes are
                collective.
            normalisers: of the whole step; each loss is divided by them (objectives/base.py).
        """
        ...

    def step(self, learning_rate: float) -> StepResult:
        """Clip and update the weights. Raises NonFiniteGradientError, and then leaves them as they are."""
        ...

    def gathered(self) -> AbstractContextManager[None]:
        """A context in which the model holds whole weights on every worker, for evaluation."""
        ...

    def state(self) -> EngineState:
        """Collective: every worker calls it; rank 0 receives the tensors."""
        ...


def micro_batch_seed(seed: int, epoch: int, number: int) -> int:
    """Seed of the dropout and the noise of one micro-batch: the same whichever worker runs it."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}/{number}".encode(), digest_size=7).digest(), "big")


def with_noise(batch: Batch, config: RunConfig, epoch: int) -> Batch:
    """The micro-batch with what its NEFTune noise is drawn by (model/forward.py); as it is where the run wants none."""
    alpha = config.train.neftune_noise_alpha
    if alpha is None:
        return batch
    seed = micro_batch_seed(config.seed, epoch, batch.meta["number"])
    return replace(batch, meta=batch.meta | {"noise": (alpha, seed)})
