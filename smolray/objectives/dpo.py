"""Direct preference optimisation: losses and metrics as in trl.DPOTrainer (1.16)."""

import torch
from torch.nn import functional as F

from smolray.config import DPOConfig
from smolray.data.batch import Batch
from smolray.objectives.base import Contributions, Head, Normalisers, sum_by_completion, token_logps

DPO_METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


def dpo(
    head: Head, hidden: torch.Tensor, batch: Batch, normalisers: Normalisers, settings: DPOConfig
) -> tuple[torch.Tensor, Contributions]:
    """The loss types of `settings`, weighted.

    Completions alternate: chosen, rejected; `batch.reference_logps` (C,) are the reference model's.

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
            loss = loss - weight * per_token[batch.target_completion % 2 == 0].sum() / normalisers.chosen_tokens
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
            each = (
                -(1 - flipped) * F.logsigmoid(settings.beta * delta) + flipped * F.logsigmoid(-settings.beta * delta)
            ) / (1 - 2 * flipped)
        loss = loss + weight * each.sum() / normalisers.samples
    with torch.no_grad():
        rewards = settings.beta * ratio
        chosen, rejected = rewards[0::2], rewards[1::2]
        values = (chosen, rejected, (chosen > rejected).float(), chosen - rejected, logps[0::2], logps[1::2])
        contributions = {
            name: value.sum() / normalisers.samples for name, value in zip(DPO_METRICS, values, strict=True)
        }
    return loss, contributions
