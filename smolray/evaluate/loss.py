"""The loss of the validation answers, as in training but without dropout.

In: a model and packed Batches. Out: the mean over all trained tokens.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from smolray.data.batch import Batch
from smolray.model.forward import target_states
from smolray.model.load import base_model
from smolray.objectives.base import Normalisers
from smolray.objectives.sft import sft


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Batch], label_tokens: int, device: torch.device) -> float:
    """Cross entropy of the batches of all workers, divided by `label_tokens`, which is their number of trained tokens.

    Collective: all receive the same value. The model keeps its mode.
    """
    training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    for batch in batches:
        batch = batch.to(device)
        hidden = target_states(model, batch)
        loss, _ = sft(base_model(model).lm_head, hidden, batch, Normalisers(0, label_tokens))
        total += loss.double()

    dist.all_reduce(total)
    model.train(training)
    return total.item()
