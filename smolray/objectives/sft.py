"""Supervised fine-tuning: cross entropy of the trained tokens."""

import torch
from torch.nn import functional as F

from smolray.config import RunConfig
from smolray.data.batch import Batch
from smolray.objectives.base import Contributions, Head, Normalisers, Objective, fused_head


def objective(config: RunConfig) -> Objective:
    """The objective of a run with method=sft."""
    return Objective(("token_accuracy",), sft)


def sft(head: Head, hidden: torch.Tensor, batch: Batch, normalisers: Normalisers) -> tuple[torch.Tensor, Contributions]:
    """Cross entropy of the trained tokens (TRL's completion-only loss). `hidden`: (N, hidden)."""
    if (fused := fused_head(head, hidden)) is not None:
        loss, hits = fused.summed_loss(hidden, batch.target_ids)
        return loss / normalisers.label_tokens, {"token_accuracy": hits / normalisers.label_tokens}
    logits = head(hidden).float()
    loss = F.cross_entropy(logits, batch.target_ids, reduction="sum") / normalisers.label_tokens
    with torch.no_grad():
        correct = (logits.argmax(-1) == batch.target_ids).sum()
    return loss, {"token_accuracy": correct / normalisers.label_tokens}
