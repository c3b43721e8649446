"""Contrastive training of image and text embeddings over all pairs of an optimizer step.

In: the Batches of a step and their embeddings, computed without gradients. Out: the Batches with the gradient of the
step's loss with respect to each embedding. A second pass carries these gradients back through the model. So the memory
is that of one micro-batch, and the loss is that of the whole step, on any number of workers.

Sources: InfoNCE arXiv:1807.03748, in both directions 2103.00020; gradient cache (GradCache) 2101.06983; last token of
a language model 2410.05160.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from smolray.data.batch import Batch
from smolray.model.forward import hidden_states


def pooled(hidden: torch.Tensor) -> torch.Tensor:
    """Embedding of each completion: the last hidden state of its last token, scaled to length 1.

    (C, hidden) -> (C, hidden) float32.
    """
    return F.normalize(hidden.float(), dim=-1)


def embeddings(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The embedding of each completion of the batch: (C, hidden) float32."""
    return pooled(hidden_states(model, batch, batch.ends))


def info_nce(
    images: torch.Tensor, texts: torch.Tensor, keys: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each pair, and whether its text finds its image among all images.

    Pairs with the same image or the same text are not negatives of each other.

    Args:
        images: (N, width) embeddings, one row for each pair.
        texts: (N, width) embeddings.
        keys: (N, 2) int64, what identifies the image and the text.
        temperature: divides the similarities.

    Returns:
        Losses (N,) float32 and hits (N,) bool.
    """
    scores = texts @ images.T / temperature
    same = (keys[:, None] == keys[None]).any(-1)
    scores = scores.masked_fill(same & ~torch.eye(len(same), dtype=torch.bool, device=same.device), -torch.inf)

    own = torch.arange(len(scores), device=scores.device)
    losses = (F.cross_entropy(scores, own, reduction="none") + F.cross_entropy(scores.T, own, reduction="none")) / 2
    return losses, scores.argmax(1) == own


def contrast(
    batches: Sequence[Batch], found: Sequence[torch.Tensor], temperature: float, device: torch.device
) -> list[Batch]:
    """The batches of this worker with `embedding_grad` and `contributions` set.

    `found`: their embeddings, (C, width) each. This is a collective: a worker without batches must call it too.
    """
    # (pairs, 4): the places of image and text in the batch, the keys of both
    places = [torch.tensor(batch.meta["pairs"], dtype=torch.int64, device=device) for batch in batches]
    own_vectors = [torch.stack([e[p[:, 0]], e[p[:, 1]]], 1) for e, p in zip(found, places, strict=True)]
    own_keys = [p[:, 2:] for p in places]
    vectors, first = _gathered(torch.cat(own_vectors) if batches else torch.zeros(0, 2, 1, device=device))
    keys, _ = _gathered(torch.cat(own_keys) if batches else torch.zeros(0, 2, dtype=torch.int64, device=device))
    if not len(vectors):  # a step without samples, in which DeepSpeed creates the optimizer's moments
        return list(batches)

    vectors.requires_grad_()
    losses, hits = info_nce(vectors[:, 0], vectors[:, 1], keys, temperature)
    (gradient,) = torch.autograd.grad(losses.mean(), vectors)

    prepared = []
    for batch, e, p in zip(batches, found, places, strict=True):
        part = slice(first, first := first + len(p))
        grad = torch.zeros_like(e)
        grad = grad.index_add(0, p[:, 0], gradient[part, 0]).index_add(0, p[:, 1], gradient[part, 1])
        contributions = torch.stack([losses[part].sum(), hits[part].sum()]).detach() / len(losses)
        prepared.append(replace(batch, embedding_grad=grad, contributions=contributions))
    return prepared


def _gathered(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The rows of all workers in the order of ranks, and the place of this worker's first row.

    A worker without rows does not need to know their width.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    shapes = [torch.zeros(2, dtype=torch.int64, device=rows.device) for _ in range(world)]
    dist.all_gather(shapes, torch.tensor([len(rows), rows.shape[-1]], device=rows.device))
    counts, width = [int(s[0]) for s in shapes], max(int(s[1]) for s in shapes)

    padded = torch.zeros(max(counts), *rows.shape[1:-1], width, dtype=rows.dtype, device=rows.device)
    padded[: len(rows), ..., : rows.shape[-1]] = rows
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]), sum(counts[:rank])
