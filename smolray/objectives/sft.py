"""Supervised fine-tuning: cross entropy of the trained tokens."""

import torch
from torch.nn import functional as F

from smolray.config import RunConfig
from smolray.data.batch import Batch
from smolray.objectives.base import Contributions, Head, Normalisers, Objective


def objective(config: RunConfig) -> Objective:
    """The objective of a run with method=sft."""
    return Objective(("token_accuracy",), sft)


def sft(head: Head, hidden: torch.Tensor, batch: Batch, normalisers: Normalisers) -> tuple[torch.Tensor, Contributions]:
    """Cross entropy of the trained tokens (TRL's completion-only loss). `hidden`: (N, hidden)."""
    logits = head(hidden).float()
    loss = F.cross_entropy(logits, batch.target_ids, reduction="sum") / normalisers.label_tokens
    with torch.no_grad():
        correct = (logits.argmax(-1) == batch.target_ids).sum()
    return loss, {"token_accuracy": correct / normalisers.label_tokens}
