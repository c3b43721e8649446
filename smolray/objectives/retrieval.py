"""The objective of image search by text: the second pass of a contrastive step.

In: Batches that contrastive.py has prepared. Out: a loss whose gradient is that of the whole step.
"""

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
    """The contribution of this batch to the loss of the step, which is already known.

    Its gradient is `batch.embedding_grad`, applied to the embeddings.

    `hidden`: (C, hidden), the last hidden states of each completion's last token.
    """
    if not len(batch.embedding_grad):  # a dummy
        return 0.0 * hidden.float().sum(), {"in_batch_accuracy": hidden.new_zeros((), dtype=torch.float32)}
    surrogate = (pooled(hidden) * batch.embedding_grad).sum()
    return batch.contributions[0] + surrogate - surrogate.detach(), {"in_batch_accuracy": batch.contributions[1]}
