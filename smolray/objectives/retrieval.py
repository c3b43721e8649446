"""Image search by text: the second pass of a contrastive step, whose batches contrastive.py has prepared."""

import torch

from smolray.config import RunConfig
from smolray.data.batch import Batch
from smolray.objectives.base import Contributions, Head, Normalisers, Objective
from smolray.objectives.contrastive import pooled


def objective(config: RunConfig) -> Objective:
    """The objective of a run with method=retrieval."""
    return Objective(("in_batch_accuracy",), contrastive_loss)


def contrastive_loss(
    head: Head, hidden: torch.Tensor, batch: Batch, normalisers: Normalisers
) -> tuple[torch.Tensor, Contributions]:
    """This batch's contribution to a loss that is known already, with its gradient by the embeddings.

    `hidden`: (C, hidden), the last hidden states of each completion's last token.
    """
    if not len(batch.embedding_grad):  # a dummy
        return 0.0 * hidden.float().sum(), {"in_batch_accuracy": hidden.new_zeros((), dtype=torch.float32)}
    surrogate = (pooled(hidden) * batch.embedding_grad).sum()
    return batch.contributions[0] + surrogate - surrogate.detach(), {"in_batch_accuracy": batch.contributions[1]}
