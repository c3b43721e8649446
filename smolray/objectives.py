"""What is minimised: (head, last hidden states where they are asked for, Batch, Totals) -> this micro-batch's share of the step's loss and metrics. Pure.

Every share is already divided by the total of the whole step over all workers, so shares simply add up. The language-model head is applied
only at positions that predict a trained token. DPO's losses and metrics are those of trl.DPOTrainer (1.16).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from smolray.config import DPOConfig, RunConfig
from smolray.data.collate import Batch

Head = Callable[[torch.Tensor], torch.Tensor]  # (N, hidden) -> logits (N, vocabulary)
Shares = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Totals:
    """What an optimizer step holds over all workers: the divisors of its means."""

    samples: int  # conversations, or pairs
    label_tokens: int  # trained tokens
    chosen_tokens: int = 0  # of the preferred answers


@dataclass(frozen=True)
class Objective:
    """`loss`: of the head and the last hidden states at `positions`. `metrics`: the names that it gives a share of, the same for every batch.

    `pairs`: it compares chosen with rejected answers.
    """

    metrics: tuple[str, ...]
    loss: Callable[[Head, torch.Tensor, Batch, Totals], tuple[torch.Tensor, Shares]]
    pairs: bool = False
    embeds: bool = False  # contrastive: an engine prepares the batches of a step together (contrastive.py)

    def positions(self, batch: Batch) -> torch.Tensor:
        """Of the B x L laid flat those whose last hidden states `loss` is given."""
        return batch.ends if self.embeds else batch.target_positions


def objective_of(config: RunConfig) -> Objective:
    """The objective of a run's method."""
    if config.method == "sft":
        return Objective(("token_accuracy",), sft)
    if config.method == "retrieval":
        return Objective(("in_batch_accuracy",), pulled, embeds=True)
    settings = config.dpo
    return Objective(DPO_METRICS, lambda head, hidden, batch, totals: dpo(head, hidden, batch, totals, settings), pairs=True)


def sft(head: Head, hidden: torch.Tensor, batch: Batch, totals: Totals) -> tuple[torch.Tensor, Shares]:
    """Cross entropy of the trained tokens (TRL's completion-only loss). `hidden`: (N, hidden)."""
    logits = head(hidden).float()
    loss = F.cross_entropy(logits, batch.target_ids, reduction="sum") / totals.label_tokens
    with torch.no_grad():
        correct = (logits.argmax(-1) == batch.target_ids).sum()
    return loss, {"token_accuracy": correct / totals.label_tokens}


def pulled(head: Head, hidden: torch.Tensor, batch: Batch, totals: Totals) -> tuple[torch.Tensor, Shares]:
    """Second pass of a contrastive step: this batch's share of a loss that is known already, with its gradient by the embeddings."""
    if not len(batch.pull):  # a dummy
        return 0.0 * hidden.float().sum(), {"in_batch_accuracy": hidden.new_zeros((), dtype=torch.float32)}
    surrogate = (pooled(hidden) * batch.pull).sum()
    return batch.shares[0] + surrogate - surrogate.detach(), {"in_batch_accuracy": batch.shares[1]}


def pooled(hidden: torch.Tensor) -> torch.Tensor:
    """Embedding of each completion: the last hidden state of its last token, of length 1. (C, hidden) -> (C, hidden) float32."""
    return F.normalize(hidden.float(), dim=-1)


def token_logps(head: Head, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Log-probability of each trained token from (N, hidden): (N,) float32."""
    return -F.cross_entropy(head(hidden).float(), batch.target_ids, reduction="none")


def completion_logps(head: Head, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Log-probability of each completion, summed over its trained tokens: (C,) float32."""
    return sum_by_completion(token_logps(head, hidden, batch), batch)


def sum_by_completion(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """(N,) -> (C,): sums over the trained tokens of each completion."""
    return torch.zeros(len(batch.ends), dtype=values.dtype, device=values.device).index_add(0, batch.target_completion, values)


DPO_METRICS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")


def dpo(head: Head, hidden: torch.Tensor, batch: Batch, totals: Totals, settings: DPOConfig) -> tuple[torch.Tensor, Shares]:
    """The loss types of `settings`, weighted. Completions alternate: chosen, rejected; `batch.reference_logps` (C,) are the reference model's.

    Sources: DPO arXiv:2305.18290; IPO 2310.12036 (per token, as TRL has it); hinge 2305.10425; robust 2403.00409.
    """
    per_token = token_logps(head, hidden, batch)
    logps = sum_by_completion(per_token, batch)
    length = sum_by_completion(torch.ones_like(per_token), batch)
    ratio = logps - batch.reference_logps
    delta = ratio[0::2] - ratio[1::2]
    loss = hidden.new_zeros((), dtype=torch.float32)
    for kind, weight in zip(settings.loss_type, settings.loss_weights or [1.0] * len(settings.loss_type), strict=True):
        if kind == "sft":
            loss = loss - weight * per_token[batch.target_completion % 2 == 0].sum() / totals.chosen_tokens
            continue
        if kind == "sigmoid":
            each = -F.logsigmoid(settings.beta * delta)
        elif kind == "hinge":
            each = torch.relu(1 - settings.beta * delta)
        elif kind == "ipo":
            mean = ratio / length.clamp(min=1.0)
            each = (mean[0::2] - mean[1::2] - 1 / (2 * settings.beta)) ** 2
        else:
            flipped = settings.label_smoothing
            each = (-(1 - flipped) * F.logsigmoid(settings.beta * delta) + flipped * F.logsigmoid(-settings.beta * delta)) / (1 - 2 * flipped)
        loss = loss + weight * each.sum() / totals.samples
    with torch.no_grad():
        rewards = settings.beta * ratio
        chosen, rejected = rewards[0::2], rewards[1::2]
        values = (chosen, rejected, (chosen > rejected).float(), chosen - rejected, logps[0::2], logps[1::2])
        shares = {name: value.sum() / totals.samples for name, value in zip(DPO_METRICS, values, strict=True)}
    return loss, shares
