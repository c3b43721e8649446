"""The loss of a batch, straight from the model and without an engine."""

from smolray.model.forward import target_states
from smolray.model.load import base_model
from smolray.objectives.base import Normalisers
from smolray.objectives.sft import sft


def sft_sum(model, batch):
    """Sum of the cross entropies of the trained tokens."""
    return sft(base_model(model).lm_head, target_states(model, batch), batch, Normalisers(1, 1))[0]
