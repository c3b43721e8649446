"""The parts of every objective: the loss of one micro-batch and its metrics. All functions are pure.

In: the language-model head, the last hidden states at the positions that the objective selects, a Batch, and the
Normalisers of the whole optimizer step. Out: this micro-batch's contribution to the step's loss and metrics.

Each contribution is already divided by the total of the step over all workers, so contributions add up. The head is
applied only at positions that predict a trained token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from smolray.data.batch import Batch

Head = Callable[[torch.Tensor], torch.Tensor]  # (N, hidden) -> logits (N, vocabulary)
Contributions = dict[str, torch.Tensor]

# Metrics of methods that learn from pairs, by TRL's names.
PREFERENCE_METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


@dataclass(frozen=True)
class Normalisers:
    """Counts over all workers in an optimizer step: the divisors of its means."""

    samples: int  # conversations, or pairs
    label_tokens: int  # trained tokens
    chosen_tokens: int = 0  # trained tokens of the chosen answers


Loss = Callable[[Head, torch.Tensor, Batch, Normalisers], tuple[torch.Tensor, Contributions]]


@dataclass(frozen=True)
class Objective:
    """A loss, and what an engine must know about it.

    Attributes:
        metrics: the names that `loss` contributes to, the same for every batch.
        loss: takes the head, the last hidden states at `positions`, the batch and the normalisers.
        pairs: the completions of a batch alternate: chosen, rejected.
        embeds: the batches of a step are prepared together (contrastive.py).
    """

    metrics: tuple[str, ...]
    loss: Loss
    pairs: bool = False
    embeds: bool = False

    def positions(self, batch: Batch) -> torch.Tensor:
        """The positions whose last hidden states `loss` takes, counted in the flattened (B, L): (N,) int64."""
        return batch.ends if self.embeds else batch.target_positions


def token_logps(head: Head, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Log-probability of each trained token from (N, hidden): (N,) float32."""
    if (fused := fused_head(head, hidden)) is not None:
        return -fused.losses(hidden, batch.target_ids)
    return -F.cross_entropy(head(hidden).float(), batch.target_ids, reduction="none")


def fused_head(head: Head, hidden: torch.Tensor) -> Any:
    """The head, if it computes this loss without its logits (model/liger.py, FusedHead); else None."""
    return head if hasattr(head, "fuses") and head.fuses(hidden) else None


def completion_logps(head: Head, hidden: torch.Tensor, batch: Batch, mean: bool = False) -> torch.Tensor:
    """Log-probability of each completion, the sum (or `mean`) over its trained tokens: (C,) float32."""
    per_token = token_logps(head, hidden, batch)
    sums = sum_by_completion(per_token, batch)
    return sums / completion_lengths(per_token, batch) if mean else sums


def completion_lengths(per_token: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Trained tokens of each completion, at least 1: (C,), of the type of `per_token`."""
    return sum_by_completion(torch.ones_like(per_token), batch).clamp(min=1.0)


def sum_by_completion(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """(N,) -> (C,): sums over the trained tokens of each completion."""
    return torch.zeros(len(batch.ends), dtype=values.dtype, device=values.device).index_add(
        0, batch.target_completion, values
    )


@torch.no_grad()
def preference_metrics(rewards: torch.Tensor, logps: torch.Tensor, normalisers: Normalisers) -> Contributions:
    """PREFERENCE_METRICS from the rewards and log-probabilities of alternating completions, (C,) each."""
    chosen, rejected = rewards[0::2], rewards[1::2]
    values = (chosen, rejected, (chosen > rejected).float(), chosen - rejected, logps[0::2], logps[1::2])
    return {name: value.sum() / normalisers.samples for name, value in zip(PREFERENCE_METRICS, values, strict=True)}
