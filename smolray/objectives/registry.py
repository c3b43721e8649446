"""Which objective a run's method has."""

from smolray.config import RunConfig
from smolray.objectives.base import Objective
from smolray.objectives.contrastive import contrastive_loss
from smolray.objectives.dpo import DPO_METRICS, dpo
from smolray.objectives.sft import sft


def objective_of(config: RunConfig) -> Objective:
    """The objective of a run's method."""
    if config.method == "sft":
        return Objective(("token_accuracy",), sft)
    if config.method == "retrieval":
        return Objective(("in_batch_accuracy",), contrastive_loss, embeds=True)
    settings = config.dpo
    return Objective(
        DPO_METRICS,
        lambda head, hidden, batch, normalisers: dpo(head, hidden, batch, normalisers, settings),
        pairs=True,
    )
