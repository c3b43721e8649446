"""Direct preference optimisation: losses and metrics as in trl.DPOTrainer (1.16)."""

from functools import partial

import torch
from torch.nn import functional as F

from smolray.config import DPOConfig, RunConfig
from smolray.data.batch import Batch
from smolray.objectives.base import (
    PREFERENCE_METRICS,
    Contributions,
    Head,
    Normalisers,
    Objective,
    completion_lengths,
    preference_metrics,
    sum_by_completion,
    token_logps,
)


def objective(config: RunConfig) -> Objective:
    """The objective of a run with method=dpo."""
    return Objective(PREFERENCE_METRICS, partial(dpo, settings=config.dpo))


def dpo(
    head: Head, hidden: torch.Tensor, batch: Batch, normalisers: Normalisers, settings: DPOConfig
) -> tuple[torch.Tensor, Contributions]:
    """The loss types of `settings`, weighted.

    Completions alternate: chosen, rejected; `batch.reference_logps` (C,) are the reference model's. `hidden`:
    (N, hidden).

    Sources: DPO arXiv:2305.18290; IPO 2310.12036 (per token, as TRL has it); hinge 2305.10425; robust 2403.00409.
    """
    per_token = token_logps(head, hidden, batch)
    logps = sum_by_completion(per_token, batch)
    ratio = logps - batch.reference_logps
    mean_ratio = ratio / completion_lengths(per_token, batch)

    loss = hidden.new_zeros((), dtype=torch.float32)
    for kind, weight in zip(settings.loss_type, settings.loss_weights or [1.0] * len(settings.loss_type), strict=True):
        if kind == "sft":
            loss = loss - weight * per_token[batch.target_completion % 2 == 0].sum() / normalisers.chosen_tokens
        else:
            loss = loss + weight * _pair_losses(kind, ratio, mean_ratio, settings).sum() / normalisers.samples

    return loss, preference_metrics(settings.beta * ratio, logps, normalisers)


def _pair_losses(kind: str, ratio: torch.Tensor, mean_ratio: torch.Tensor, settings: DPOConfig) -> torch.Tensor:
    """The loss of each pair from the log-ratios to the reference model, (C,) -> (C / 2,)."""
    scaled = settings.beta * (ratio[0::2] - ratio[1::2])
    if kind == "sigmoid":
        return -F.logsigmoid(scaled)
    if kind == "hinge":
        return torch.relu(1 - scaled)
    if kind == "ipo":
        return (mean_ratio[0::2] - mean_ratio[1::2] - 1 / (2 * settings.beta)) ** 2
    flipped = settings.label_smoothing
    return (-(1 - flipped) * F.logsigmoid(scaled) + flipped * F.logsigmoid(-scaled)) / (1 - 2 * flipped)
