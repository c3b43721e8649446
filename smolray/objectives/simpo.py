"""Simple preference optimisation: loss and metrics of TRL's CPOTrainer (1.16), loss_type "simpo" and cpo_alpha 0."""

from functools import partial

import torch
from torch.nn import functional as F

from smolray.config import RunConfig, SimPOConfig
from smolray.data.batch import Batch
from smolray.objectives.base import (
    PREFERENCE_METRICS,
    Contributions,
    Head,
    Normalisers,
    Objective,
    completion_logps,
    preference_metrics,
)


def objective(config: RunConfig) -> Objective:
    """The objective of a run with method=simpo."""
    return Objective(PREFERENCE_METRICS, partial(simpo, settings=config.simpo))


def simpo(
    head: Head, hidden: torch.Tensor, batch: Batch, normalisers: Normalisers, settings: SimPOConfig
) -> tuple[torch.Tensor, Contributions]:
    """-log sigmoid(reward of chosen - reward of rejected - gamma), the mean over pairs.

    The reward of an answer is beta times the mean log-probability of its tokens, so its length does not count and no
    reference model is needed. Completions alternate: chosen, rejected. `hidden`: (N, hidden).

    Source: SimPO arXiv:2405.14734, equation 6.
    """
    logps = completion_logps(head, hidden, batch, mean=True)
    rewards = settings.beta * logps
    losses = -F.logsigmoid(rewards[0::2] - rewards[1::2] - settings.simpo_gamma)
    return losses.sum() / normalisers.samples, preference_metrics(rewards, logps, normalisers)
