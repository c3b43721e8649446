"""What the loop asks of an engine: one optimizer step over a worker's micro-batches, and state by parameter name.

An engine runs under plain `torchrun` as well: it needs an initialised process group and nothing of Ray.
"""

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from smolray.data.collate import Batch
from smolray.objectives import Objective, Totals
from smolray.optim import Moments


class NonFiniteLossError(RuntimeError):
    """The unscaled loss is nan or infinite; the optimizer has not stepped."""


@dataclass(frozen=True)
class LocalSums:
    """Sums over one worker's micro-batches of a step."""

    loss: torch.Tensor  # () float64, on the device: this worker's share of the step's loss
    metrics: torch.Tensor  # (metrics of the objective,) float64: its shares of those
    samples: int = 0
    tokens: int = 0  # padding left out
    ids: tuple[tuple[int, tuple[str, ...]], ...] = ()  # (micro-batch, its sample ids)
    seconds: float = 0.0  # until its own gradients were there: those of waiting for data included, of waiting for other workers not


@dataclass(frozen=True)
class StepResult:
    grad_norm: float  # of the mean loss over the step's tokens, before clipping
    skipped: bool = False  # fp16 overflow: the samples are consumed, the weights unchanged
    loss_scale: float | None = None


@dataclass
class EngineState:
    """World-size-free and engine-free: tensors on the CPU by Hugging Face parameter name. Filled on rank 0 only.

    Weights and moments are fp32; a parameter whose moments are kept in 8 bit has them in `codes` instead (optim.CODES).
    """

    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    exp_avg: dict[str, torch.Tensor] = field(default_factory=dict)
    exp_avg_sq: dict[str, torch.Tensor] = field(default_factory=dict)
    codes: dict[str, Moments] = field(default_factory=dict)
    optimizer_step: int = 0
    loss_scale: float | None = None

    def put(self, name: str, weight: torch.Tensor, moments: Moments) -> None:
        """Copy what an engine holds of one parameter."""
        self.weights[name] = weight.detach().to("cpu", torch.float32, copy=True)
        copied = {key: value.detach().to("cpu", copy=True) for key, value in moments.items()}
        if "exp_avg" in copied:
            self.exp_avg[name], self.exp_avg_sq[name] = copied["exp_avg"].float(), copied["exp_avg_sq"].float()
        else:
            self.codes[name] = copied

    def moments(self, name: str) -> Moments:
        """Adam's moments of one parameter, as they were kept."""
        return self.codes[name] if name in self.codes else {"exp_avg": self.exp_avg[name], "exp_avg_sq": self.exp_avg_sq[name]}


class Engine(Protocol):
    model: nn.Module
    objective: Objective
    device: torch.device
    epoch: int  # set by the loop; keys the dropout
    data_parallel: tuple[int, int]  # this worker's (rank, number) among those that are dealt different micro-batches
    sees_images: bool  # whether this worker's micro-batches need the content of their tiles

    def accumulate(self, batches: Iterable[Batch], forwards: int, totals: Totals) -> LocalSums:
        """Backward of this worker's shares of the loss (objectives.py); gradients are summed over all workers.

        `forwards`: the most micro-batches any worker has in this step, for engines whose forward passes are collective.
        """
        ...

    def step(self, learning_rate: float) -> StepResult:
        """Clip and update the weights."""
        ...

    def gathered(self) -> AbstractContextManager[None]:
        """Inside it the model holds whole weights on every worker, for evaluation."""
        ...

    def state(self) -> EngineState:
        """Collective: every worker calls it; rank 0 receives the tensors."""
        ...


def canonical_name(name: str) -> str:
    """The Hugging Face name of a parameter, without what PEFT puts around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".default.", ".")


def micro_batch_seed(seed: int, epoch: int, number: int) -> int:
    """Seed of the dropout of one micro-batch: the same whichever worker runs it."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}/{number}".encode(), digest_size=7).digest(), "big")


class StateMismatchError(ValueError):
    """A checkpoint's weights do not fit the run's parameters; the message says which."""


def load_weights(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, torch.Tensor]) -> None:
    """Copy a checkpoint's weights into parameters of the same canonical names. Raises StateMismatchError where names or shapes differ."""
    if lost := sorted(parameters.keys() ^ weights.keys()):
        named = f"{len(lost)}: {', '.join(lost[:3])} …"
        raise StateMismatchError(f"the checkpoint and the run train different parameters ({named}): model.train or lora has changed")
    for name, parameter in parameters.items():
        if weights[name].numel() != (numel := getattr(parameter, "ds_numel", parameter.numel())):
            raise StateMismatchError(f"{name} has {numel} values in the run and {weights[name].numel()} in the checkpoint: lora.r or the model has changed")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name].to(parameter.device))
