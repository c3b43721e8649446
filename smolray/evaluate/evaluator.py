"""Distributed evaluation: each worker decodes its own validation batches, and all get the predictions of all.

In: an engine's model and a stream of prompts. Out: an EvalReport: metrics over all and by question type, and every
prediction.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from smolray.data.batch import Batch
from smolray.data.encode import Encoder
from smolray.evaluate.bootstrap import Estimates
from smolray.evaluate.fit import PartsThatFit
from smolray.evaluate.measure import measure, rows_by_type
from smolray.evaluate.metrics.exact_match import is_correct
from smolray.model.decoding import greedy, stop_ids_of
from smolray.run.predictions import Prediction

QuestionRecord = dict[str, Any]  # what a Batch tells of a question: data/collate.py's question_record, and more


@dataclass(frozen=True)
class EvalReport:
    """What an evaluation found.

    Attributes:
        accuracy: exact match by question type, with "overall".
        counts: predictions by question type, with "overall".
        predictions: id, key, type, question, prediction, answer, answers and correct of each question.
        metrics: name -> question type -> value, low, high, samples.
        skipped: why a metric is missing, by its name.
        left_out: questions too long for data.max_length, which are in no metric.
    """

    accuracy: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    predictions: list[Prediction] = field(default_factory=list)
    metrics: dict[str, Estimates] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    left_out: int = 0

    @property
    def samples(self) -> int:
        return len(self.predictions)


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    encoder: Encoder,
    max_new_tokens: int,
    device: torch.device,
    metrics: Sequence[str] = ("exact_match",),
) -> EvalReport:
    """Collective: every worker passes its own batches, all receive the whole report."""
    own: list[Prediction] = []
    stop_ids = stop_ids_of(model, encoder)
    decode = PartsThatFit(lambda batch: greedy(model, batch, max_new_tokens, stop_ids))
    for batch in batches:
        ids = decode(batch.to(device))
        texts = encoder.tokenizer.batch_decode(ids, skip_special_tokens=True)
        own += [to_prediction(record, text) for record, text in zip(batch.meta["records"], texts, strict=True)]

    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return summarize([prediction for part in parts for prediction in part], metrics)


def to_prediction(record: QuestionRecord, text: str) -> Prediction:
    """What is kept of one question: its record, the predicted text, and whether that is correct."""
    kept = {name: record[name] for name in ("id", "key", "type", "question", "answer", "answers")}
    return kept | {"prediction": text.strip(), "correct": is_correct(text, record["answers"])}


def summarize(predictions: Sequence[Prediction], metrics: Sequence[str] = ("exact_match",)) -> EvalReport:
    """Accuracy, counts and the named metrics, over all and by question type; also of predictions read from a run."""
    rows = rows_by_type(predictions) if predictions else {}
    correct = np.array([prediction["correct"] for prediction in predictions], bool)
    measured, skipped = measure(predictions, metrics)
    return EvalReport(
        accuracy={kind: float(correct[numbers].mean()) for kind, numbers in rows.items()},
        counts={kind: len(numbers) for kind, numbers in rows.items()},
        predictions=list(predictions),
        metrics=measured,
        skipped=skipped,
    )
