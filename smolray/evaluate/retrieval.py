"""Image search by text: how well a caption finds its images.

In: a model, images and captions. Out: a score for every caption and image, and from those recall@k and mean average
precision. A caption's score for an image is the cosine of their embeddings (method: retrieval), or the mean
log-probability of its tokens given the image.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from smolray.data.batch import Batch
from smolray.data.collate import Group, collate_training
from smolray.data.encode import Encoder
from smolray.data.sample import Conversation, Message, Part, ShardRow, image_key
from smolray.evaluate.bootstrap import Figure, MetricError, Scores, figure
from smolray.evaluate.evaluator import EvalReport, score, summarize
from smolray.model.forward import target_states
from smolray.model.load import base_model
from smolray.objectives.base import completion_logps
from smolray.objectives.contrastive import embeddings
from smolray.run.predictions import Record

LogProbabilities = Callable[[Batch], torch.Tensor]  # (C,): of each completion of a batch, per trained token
CELLS = 2_000_000  # scores of texts for images at a time: 16 MB, and a few such arrays


@dataclass
class Embedded:
    """Images by key and distinct texts, each with its vector and the record that stands for it, and the keys that each
    text asks for.

    Of several records the one with the smallest (key, id) stands for an image or a text, however they were dealt to
    workers.
    """

    images: dict[str, tuple[Record, np.ndarray]] = field(default_factory=dict)
    texts: dict[str, tuple[Record, np.ndarray]] = field(default_factory=dict)
    wanted: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    def add_image(self, record: Record, vector: np.ndarray) -> None:
        _keep_first(self.images, record["key"], record, vector)

    def add_text(self, record: Record, vector: np.ndarray, keys: Iterable[str]) -> None:
        _keep_first(self.texts, record["answer"], record, vector)
        self.wanted[record["answer"]].update(keys)

    def add(self, other: "Embedded") -> None:
        for record, vector in other.images.values():
            self.add_image(record, vector)
        for text, (record, vector) in other.texts.items():
            self.add_text(record, vector, other.wanted[text])


def _keep_first(kept: dict[str, tuple[Record, np.ndarray]], name: str, record: Record, vector: np.ndarray) -> None:
    if name not in kept or (record["key"], record["id"]) < (kept[name][0]["key"], kept[name][0]["id"]):
        kept[name] = record, vector


@torch.no_grad()
def search_report(model: nn.Module, batches: Iterable[Batch], device: torch.device) -> EvalReport:
    """Every distinct text of the batches (collate_pairs) looks for its images among all of theirs.

    Collective: all receive the whole report.

    `exact_match` is recall@1: a prediction is the key of the image found first, the right answers are the keys of all
    images with that text.
    """
    mine = Embedded()
    for batch in batches:
        found = embeddings(model, batch.to(device)).cpu().numpy()
        for record, (image, text, *_) in zip(batch.meta["records"], batch.meta["pairs"], strict=True):
            mine.add_image(record, found[image])
            mine.add_text(record, found[text], [record["key"]])
    first = dist.get_rank() == 0
    parts: list[Any] | None = [None] * dist.get_world_size() if first else None
    dist.gather_object(mine, parts)
    told: list[Any] = [None]
    if parts is not None:
        for part in parts[1:]:
            mine.add(part)
        try:
            told = [found_report(mine)]
        except MetricError as error:  # the others wait for an answer
            told = [error]
    dist.broadcast_object_list(told)
    if isinstance(told[0], MetricError):
        raise told[0]
    return told[0]  # type: ignore[no-any-return]


def found_report(embedded: Embedded, cells: int = CELLS) -> EvalReport:
    """What the texts find. `cells`: scores that are held at a time. Raises MetricError."""
    if not embedded.texts:
        return EvalReport()
    keys, sought = sorted(embedded.images), sorted(embedded.texts)
    number = {key: n for n, key in enumerate(keys)}
    images = np.stack([embedded.images[key][1] for key in keys]).T
    records, parts = list[Record](), list[dict[str, np.ndarray]]()
    for start in range(0, len(sought), size := max(1, cells // len(keys))):
        block = sought[start : start + size]
        scores = np.stack([embedded.texts[text][1] for text in block]) @ images
        relevant = np.zeros(scores.shape, bool)
        for row, text in zip(relevant, block, strict=True):
            row[[number[key] for key in embedded.wanted[text]]] = True
        parts.append(per_text(scores, relevant))
        for text, best in zip(block, _first(scores, relevant), strict=True):
            answers = sorted(embedded.wanted[text])
            records.append(
                score(
                    embedded.texts[text][0] | {"question": text, "answer": answers[0], "answers": answers}, keys[best]
                )
            )
    report = summarize(records)
    figures = _figures({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    return replace(report, metrics=report.metrics | {name: {"overall": value} for name, value in figures.items()})


def _first(scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """The image that each text finds first: of equal ones a wrong one, as recall@1 counts it. (texts,) int"""
    best = scores == scores.max(axis=1, keepdims=True)
    wrong = best & ~relevant
    return np.where(wrong.any(axis=1), wrong.argmax(axis=1), best.argmax(axis=1))


def caption_scores(
    images: Sequence[bytes],
    captions: Sequence[str],
    encoder: Encoder,
    log_probabilities: LogProbabilities,
    prompt: str,
    captions_per_sequence: int = 64,
) -> np.ndarray:
    """Scores of every caption for every image: (captions, images) float64.

    `prompt`: what the model was trained to answer with a caption.
    """
    columns = [
        log_probabilities(batch).double().cpu().numpy()
        for batch in caption_batches(images, captions, encoder, prompt, captions_per_sequence)
    ]
    return np.stack(columns, axis=1) if columns else np.zeros((len(captions), 0))


def caption_batches(
    images: Sequence[bytes], captions: Sequence[str], encoder: Encoder, prompt: str, captions_per_sequence: int = 64
) -> Iterator[Batch]:
    """One batch an image, its captions as branches of one prefix: the vision tower sees an image once, however many
    captions there are.

    Raises MetricError where a caption does not fit into data.max_length beside the image.
    """
    turn = Message("user", (Part("image"), Part("text", prompt)) if prompt else (Part("image"),))
    told = tuple(
        Conversation(str(n), (turn, Message("assistant", (Part("text", caption),))))
        for n, caption in enumerate(captions)
    )
    for number, image in enumerate(images):
        row = ShardRow(image_key([image], told[0]), (image,), told)
        parts = [
            tuple(range(start, min(start + captions_per_sequence, len(told))))
            for start in range(0, len(told), captions_per_sequence)
        ]
        batch = collate_training([Group(row, part) for part in parts], encoder)
        if len(batch.ends) != len(told):
            raise MetricError(
                f"image {number}: {len(told) - len(batch.ends)} of {len(told)} captions do not fit into data.max_length = {encoder.max_length}"
            )
        yield batch


def mean_log_probabilities(model: nn.Module) -> LogProbabilities:
    """The log-probabilities per token that a model gives, in eval mode and without gradients."""

    @torch.no_grad()
    def of(batch: Batch) -> torch.Tensor:
        batch = batch.to(next(model.parameters()).device)
        sums = completion_logps(base_model(model).lm_head, target_states(model, batch), batch)
        return sums / torch.bincount(batch.target_completion, minlength=len(sums))

    return of


def measure_retrieval(scores: np.ndarray, relevant: np.ndarray, ks: Sequence[int] = (1, 5, 10)) -> dict[str, Figure]:
    """`recall@k` for each k and `mean_average_precision`, with intervals over the texts; the images stay the same.

    `scores`: (texts, images) floats; `relevant`: (texts, images) bool.
    """
    return _figures(per_text(scores, relevant, ks))


def per_text(scores: np.ndarray, relevant: np.ndarray, ks: Sequence[int] = (1, 5, 10)) -> dict[str, np.ndarray]:
    """`recall@k` for each k and `mean_average_precision` of each text: (texts,) float64."""
    scores, relevant = _checked(scores, relevant)
    found = {f"recall@{k}": recall_at(scores, relevant, k).astype(np.float64) for k in ks if k <= scores.shape[1]}
    return found | {"mean_average_precision": average_precision(scores, relevant)}


def _figures(found: dict[str, np.ndarray]) -> dict[str, Figure]:
    return {name: figure(Scores.mean(values), [str(n) for n in range(len(values))]) for name, values in found.items()}


def recall_at(scores: np.ndarray, relevant: np.ndarray, k: int) -> np.ndarray:
    """Whether one of the k best images of each text is relevant: (texts,) bool.

    Equal scores count against it, so that a model which tells no image from another finds nothing.
    """
    scores, relevant = _checked(scores, relevant)
    best = np.where(relevant, scores, -np.inf).max(axis=1, keepdims=True)
    return (~relevant & (scores >= best)).sum(axis=1) < k


def average_precision(scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Average precision of each text: (texts,) float64. Images of equal score are taken together, as in scikit-learn."""
    scores, relevant = _checked(scores, relevant)
    precisions = np.empty(len(scores))
    for i, (row, hits) in enumerate(zip(scores, relevant, strict=True)):
        ordered, wanted = np.sort(row), np.sort(row[hits])
        through = len(ordered) - np.searchsorted(ordered, wanted)  # images down to the end of each tie
        precisions[i] = ((len(wanted) - np.searchsorted(wanted, wanted)) / through).mean()
    return precisions


def _checked(scores: np.ndarray, relevant: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, relevant = np.asarray(scores, np.float64), np.asarray(relevant, bool)
    if scores.ndim != 2 or scores.shape != relevant.shape:
        raise MetricError(
            f"expected scores and relevance as (texts, images), found {scores.shape} and {relevant.shape}"
        )
    if np.isnan(scores).any():
        raise MetricError(f"{int(np.isnan(scores).sum())} scores are not numbers")
    if lonely := np.flatnonzero(~relevant.any(axis=1)).tolist():
        raise MetricError(f"texts {lonely[:5]} have no relevant image: leave them out")
    return scores, relevant
