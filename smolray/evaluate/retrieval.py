"""Image search by text: how well a caption finds its images.

In: a model, images and captions. Out: a score for every caption and image, and from those recall@k and mean average precision.
A caption's score for an image is the cosine of their embeddings (method: retrieval), or the mean log-probability of its tokens given the image.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from smolray.contrastive import embeddings
from smolray.data.collate import Batch, Group, collate_training
from smolray.data.encode import Encoder
from smolray.data.sample import Conversation, Message, Part, ShardRow, image_key
from smolray.evaluate.evaluator import EvalReport, score, summarize
from smolray.evaluate.scores import Figure, MetricError, Scores, figure
from smolray.forward import hidden_states
from smolray.model.load import base_model
from smolray.objectives import completion_logps

LogProbabilities = Callable[[Batch], torch.Tensor]  # (C,): of each completion of a batch, per trained token


@torch.no_grad()
def search_report(model: nn.Module, batches: Iterable[Batch], device: torch.device) -> EvalReport:
    """Every distinct text of the batches (collate_pairs) looks for its images among all of theirs. Collective: all receive the whole report.

    `exact_match` is recall@1: a prediction is the key of the image found first, the right answers are the keys of all images with that text.
    """
    mine: list[tuple[dict[str, Any], np.ndarray]] = []
    for batch in batches:
        found = embeddings(model, batch.to(device)).cpu().numpy()
        mine += [(record, found[pair[:2]]) for record, pair in zip(batch.meta["records"], batch.meta["pairs"], strict=True)]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    images: dict[str, np.ndarray] = {}
    texts: dict[str, tuple[dict[str, Any], np.ndarray]] = {}
    wanted: dict[str, set[str]] = defaultdict(set)
    for record, (image, text) in (one for part in parts for one in part):
        images.setdefault(record["key"], image)
        texts.setdefault(record["answer"], (record, text))
        wanted[record["answer"]].add(record["key"])
    if not texts:
        return EvalReport()
    keys, sought = list(images), sorted(texts)
    scores = np.stack([texts[text][1] for text in sought]) @ np.stack(list(images.values())).T
    relevant = np.array([[key in wanted[text] for key in keys] for text in sought])
    records = [score(texts[text][0] | {"question": text, "answer": min(wanted[text]), "answers": sorted(wanted[text])}, keys[best])
               for text, best in zip(sought, scores.argmax(1), strict=True)]  # fmt: skip
    report = summarize(records)
    return replace(report, metrics=report.metrics | {name: {"overall": value} for name, value in measure_retrieval(scores, relevant).items()})


def caption_scores(
    images: Sequence[bytes], captions: Sequence[str], encoder: Encoder, log_probabilities: LogProbabilities, prompt: str, captions_per_sequence: int = 64
) -> np.ndarray:
    """Scores of every caption for every image: (captions, images) float64. `prompt`: what the model was trained to answer with a caption."""
    columns = [log_probabilities(batch).double().cpu().numpy() for batch in caption_batches(images, captions, encoder, prompt, captions_per_sequence)]
    return np.stack(columns, axis=1) if columns else np.zeros((len(captions), 0))


def caption_batches(
    images: Sequence[bytes], captions: Sequence[str], encoder: Encoder, prompt: str, captions_per_sequence: int = 64
) -> Iterator[Batch]:
    """One batch an image, its captions as branches of one prefix: the vision tower sees an image once, however many captions there are.

    Raises MetricError where a caption does not fit into data.max_length beside the image.
    """
    turn = Message("user", (Part("image"), Part("text", prompt)) if prompt else (Part("image"),))
    told = tuple(Conversation(str(n), (turn, Message("assistant", (Part("text", caption),)))) for n, caption in enumerate(captions))
    for number, image in enumerate(images):
        row = ShardRow(image_key([image], told[0]), (image,), told)
        parts = [tuple(range(start, min(start + captions_per_sequence, len(told)))) for start in range(0, len(told), captions_per_sequence)]
        batch = collate_training([Group(row, part) for part in parts], encoder)
        if len(batch.ends) != len(told):
            raise MetricError(f"image {number}: {len(told) - len(batch.ends)} of {len(told)} captions do not fit into data.max_length = {encoder.max_length}")
        yield batch


def mean_log_probabilities(model: nn.Module) -> LogProbabilities:
    """The log-probabilities per token that a model gives, in eval mode and without gradients."""

    @torch.no_grad()
    def of(batch: Batch) -> torch.Tensor:
        batch = batch.to(next(model.parameters()).device)
        sums = completion_logps(base_model(model).lm_head, hidden_states(model, batch), batch)
        return sums / torch.bincount(batch.target_completion, minlength=len(sums))

    return of


def measure_retrieval(scores: np.ndarray, relevant: np.ndarray, ks: Sequence[int] = (1, 5, 10)) -> dict[str, Figure]:
    """`recall@k` for each k and `mean_average_precision`, with intervals over the texts; the images stay the same.

    `scores`: (texts, images) floats; `relevant`: (texts, images) bool.
    """
    scores, relevant = _checked(scores, relevant)
    texts = [str(n) for n in range(len(scores))]
    found = {f"recall@{k}": recall_at(scores, relevant, k).astype(np.float64) for k in ks if k <= scores.shape[1]}
    found["mean_average_precision"] = average_precision(scores, relevant)
    return {name: figure(Scores.mean(values), texts) for name, values in found.items()}


def recall_at(scores: np.ndarray, relevant: np.ndarray, k: int) -> np.ndarray:
    """Whether one of the k best images of each text is relevant: (texts,) bool. Equal scores count against it, so that a model
    which tells no image from another finds nothing."""
    scores, relevant = _checked(scores, relevant)
    best = np.where(relevant, scores, -np.inf).max(axis=1, keepdims=True)
    return (~relevant & (scores >= best)).sum(axis=1) < k


def average_precision(scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Average precision of each text: (texts,) float64. Images of equal score are taken together, as in scikit-learn."""
    scores, relevant = _checked(scores, relevant)
    precisions = np.empty(len(scores))
    for i, (row, hits) in enumerate(zip(scores, relevant, strict=True)):
        order = np.argsort(-row, kind="stable")
        falling, hits = -row[order], hits[order]
        through = np.searchsorted(falling, falling, side="right")  # images down to the end of each tie
        precisions[i] = (np.cumsum(hits)[through - 1] / through)[hits].mean()
    return precisions


def _checked(scores: np.ndarray, relevant: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, relevant = np.asarray(scores, np.float64), np.asarray(relevant, bool)
    if scores.ndim != 2 or scores.shape != relevant.shape:
        raise MetricError(f"expected scores and relevance as (texts, images), found {scores.shape} and {relevant.shape}")
    if np.isnan(scores).any():
        raise MetricError(f"{int(np.isnan(scores).sum())} scores are not numbers")
    if lonely := np.flatnonzero(~relevant.any(axis=1)).tolist():
        raise MetricError(f"texts {lonely[:5]} have no relevant image: leave them out")
    return scores, relevant
