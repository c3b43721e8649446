"""Image search by text: how well texts find their images.

In: a model and Batches of images with their texts. Out: an EvalReport with recall@k and mean average precision. A
text and an image are compared by the cosine of their embeddings (method: retrieval).
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from smolray.data.batch import Batch
from smolray.evaluate.bootstrap import Estimate, MetricError, SampleScores, estimate
from smolray.evaluate.evaluator import EvalReport, QuestionRecord, summarize, to_prediction
from smolray.objectives.contrastive import embeddings
from smolray.run.predictions import Prediction

MAX_CELLS = 2_000_000  # similarities of texts and images held at a time: 16 MB, and a few such arrays
RANKS = (1, 5, 10)

Embedding = tuple[QuestionRecord, np.ndarray]


@dataclass
class EmbeddedPairs:
    """Images and distinct texts, each with its vector and one record, and the images that each text belongs to.

    Of several records that of the smallest (key, id) is kept, so that the assignment to workers makes no difference.

    Attributes:
        images: image key -> record and vector.
        texts: text -> record and vector.
        wanted: text -> the keys of its images.
    """

    images: dict[str, Embedding] = field(default_factory=dict)
    texts: dict[str, Embedding] = field(default_factory=dict)
    wanted: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    def add_image(self, record: QuestionRecord, vector: np.ndarray) -> None:
        _keep_first(self.images, record["key"], record, vector)

    def add_text(self, record: QuestionRecord, vector: np.ndarray, keys: Iterable[str]) -> None:
        _keep_first(self.texts, record["answer"], record, vector)
        self.wanted[record["answer"]].update(keys)

    def add(self, other: "EmbeddedPairs") -> None:
        for record, vector in other.images.values():
            self.add_image(record, vector)
        for text, (record, vector) in other.texts.items():
            self.add_text(record, vector, other.wanted[text])


@torch.no_grad()
def search_report(model: nn.Module, batches: Iterable[Batch], device: torch.device) -> EvalReport:
    """Each distinct text of the batches looks for its images among all images of all workers.

    The batches are those of collate_image_text. `exact_match` is recall@1: the prediction is the key of the image that
    is found first, the right answers are the keys of all images with that text.

    Collective: all receive the whole report. Raises MetricError on every worker.
    """
    own = EmbeddedPairs()
    for batch in batches:
        vectors = embeddings(model, batch.to(device)).cpu().numpy()
        for record, (image, text, *_) in zip(batch.meta["records"], batch.meta["pairs"], strict=True):
            own.add_image(record, vectors[image])
            own.add_text(record, vectors[text], [record["key"]])

    parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own, parts)
    outcome: list[Any] = [None]
    if parts is not None:
        for part in parts[1:]:
            own.add(part)
        try:
            outcome = [report_of(own)]
        except MetricError as error:  # the other workers wait for an outcome
            outcome = [error]
    dist.broadcast_object_list(outcome)

    if isinstance(outcome[0], MetricError):
        raise outcome[0]
    return outcome[0]  # type: ignore[no-any-return]


def report_of(pairs: EmbeddedPairs, max_cells: int = MAX_CELLS) -> EvalReport:
    """What the texts find. `max_cells`: similarities that are held at a time. Raises MetricError."""
    if not pairs.texts:
        return EvalReport()

    keys, texts = sorted(pairs.images), sorted(pairs.texts)
    images = np.stack([pairs.images[key][1] for key in keys]).T
    predictions, parts = list[Prediction](), list[dict[str, np.ndarray]]()
    for start in range(0, len(texts), size := max(1, max_cells // len(keys))):
        block = texts[start : start + size]
        similarity = np.stack([pairs.texts[text][1] for text in block]) @ images
        relevant = _relevant(block, keys, pairs.wanted)
        parts.append(per_text(similarity, relevant))
        for text, found in zip(block, _first(similarity, relevant), strict=True):
            answers = sorted(pairs.wanted[text])
            record = pairs.texts[text][0] | {"question": text, "answer": answers[0], "answers": answers}
            predictions.append(to_prediction(record, keys[found]))

    report = summarize(predictions)
    values = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    metrics = {name: {"overall": _over_texts(of_texts)} for name, of_texts in values.items()}
    return replace(report, metrics=report.metrics | metrics)


def per_text(similarity: np.ndarray, relevant: np.ndarray, ranks: Sequence[int] = RANKS) -> dict[str, np.ndarray]:
    """`recall@k` for each k of `ranks`, and `mean_average_precision`, of each text: (texts,) float64.

    `similarity`: (texts, images) floats; `relevant`: (texts, images) bool. Raises MetricError.
    """
    similarity, relevant = _checked(similarity, relevant)
    found = {
        f"recall@{k}": recall_at(similarity, relevant, k).astype(np.float64) for k in ranks if k <= similarity.shape[1]
    }
    return found | {"mean_average_precision": average_precision(similarity, relevant)}


def recall_at(similarity: np.ndarray, relevant: np.ndarray, k: int) -> np.ndarray:
    """Whether one of the k most similar images of each text is relevant: (texts,) bool.

    Equal similarities count against it, so that a model for which all images look alike finds nothing.
    """
    similarity, relevant = _checked(similarity, relevant)
    best = np.where(relevant, similarity, -np.inf).max(axis=1, keepdims=True)
    return (~relevant & (similarity >= best)).sum(axis=1) < k


def average_precision(similarity: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Average precision of each text: (texts,) float64. Equally similar images count together, as in scikit-learn."""
    similarity, relevant = _checked(similarity, relevant)
    precisions = np.empty(len(similarity))
    for i, (row, hits) in enumerate(zip(similarity, relevant, strict=True)):
        ordered, wanted = np.sort(row), np.sort(row[hits])
        through = len(ordered) - np.searchsorted(ordered, wanted)  # images down to the end of each tie
        precisions[i] = ((len(wanted) - np.searchsorted(wanted, wanted)) / through).mean()
    return precisions


def _keep_first(kept: dict[str, Embedding], name: str, record: QuestionRecord, vector: np.ndarray) -> None:
    if name not in kept or (record["key"], record["id"]) < (kept[name][0]["key"], kept[name][0]["id"]):
        kept[name] = record, vector


def _relevant(texts: Sequence[str], keys: Sequence[str], wanted: dict[str, set[str]]) -> np.ndarray:
    number = {key: n for n, key in enumerate(keys)}
    relevant = np.zeros((len(texts), len(keys)), bool)
    for row, text in zip(relevant, texts, strict=True):
        row[[number[key] for key in wanted[text]]] = True
    return relevant


def _first(similarity: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """The image that each text finds first: of equal ones a wrong one, as recall@1 counts it. Shape (texts,), int."""
    best = similarity == similarity.max(axis=1, keepdims=True)
    wrong = best & ~relevant
    return np.where(wrong.any(axis=1), wrong.argmax(axis=1), best.argmax(axis=1))


def _over_texts(values: np.ndarray) -> Estimate:
    """The mean with its interval over the texts; the images stay the same."""
    return estimate(SampleScores.mean(values), [str(n) for n in range(len(values))])


def _checked(similarity: np.ndarray, relevant: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    similarity, relevant = np.asarray(similarity, np.float64), np.asarray(relevant, bool)
    if similarity.ndim != 2 or similarity.shape != relevant.shape:
        raise MetricError(
            f"expected similarity and relevance as (texts, images), found {similarity.shape} and {relevant.shape}"
        )
    if np.isnan(similarity).any():
        raise MetricError(f"{int(np.isnan(similarity).sum())} similarities are not numbers")
    if without := np.flatnonzero(~relevant.any(axis=1)).tolist():
        raise MetricError(f"texts {without[:5]} have no relevant image: leave them out")
    return similarity, relevant
