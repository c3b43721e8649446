"""What is minimised: (head, last hidden states where they are asked for, Batch, Totals) -> this micro-batch's share of
the step's loss and metrics. Pure.

Every share is already divided by the total of the whole step over all workers, so shares simply add up. The
language-model head is applied only at positions that predict a trained token. DPO's losses and metrics are those of
trl.DPOTrainer (1.16).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from smolray.data.batch import Batch

Head = Callable[[torch.Tensor], torch.Tensor]  # (N, hidden) -> logits (N, vocabulary)
Contributions = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Normalisers:
    """What an optimizer step holds over all workers: the divisors of its means."""

    samples: int  # conversations, or pairs
    label_tokens: int  # trained tokens
    chosen_tokens: int = 0  # of the preferred answers


@dataclass(frozen=True)
class Objective:
    """`loss`: of the head and the last hidden states at `positions`.

    `metrics`: the names that it gives a share of, the same for every batch.

    `pairs`: it compares chosen with rejected answers.
    """

    metrics: tuple[str, ...]
    loss: Callable[[Head, torch.Tensor, Batch, Normalisers], tuple[torch.Tensor, Contributions]]
    pairs: bool = False
    embeds: bool = False  # contrastive: an engine prepares the batches of a step together (contrastive.py)

    def positions(self, batch: Batch) -> torch.Tensor:
        """Of the B x L laid flat those whose last hidden states `loss` is given."""
        return batch.ends if self.embeds else batch.target_positions


def token_logps(head: Head, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Log-probability of each trained token from (N, hidden): (N,) float32."""
    return -F.cross_entropy(head(hidden).float(), batch.target_ids, reduction="none")


def completion_logps(head: Head, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Log-probability of each completion, summed over its trained tokens: (C,) float32."""
    return sum_by_completion(token_logps(head, hidden, batch), batch)


def sum_by_completion(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """(N,) -> (C,): sums over the trained tokens of each completion."""
    return torch.zeros(len(batch.ends), dtype=values.dtype, device=values.device).index_add(
        0, batch.target_completion, values
    )
