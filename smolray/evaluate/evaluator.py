"""Distributed evaluation: each worker decodes its share of the validation micro-batches, rank 0 gathers predictions and
scores.

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
from transformers import PreTrainedTokenizerBase

from smolray.data.batch import Batch
from smolray.evaluate.metrics import Figures, by_type, is_correct, measure
from smolray.model.decoding import greedy
from smolray.run.predictions import Record


@dataclass(frozen=True)
class EvalReport:
    """`accuracy` (exact match) and `counts` by question type, with "overall"; `metrics`: name -> question type ->
    value, low, high, samples; `skipped`: why a metric is missing, by its name; `predictions` hold id, key, type,
    question, prediction, answer, answers, correct.
    """

    accuracy: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    predictions: list[Record] = field(default_factory=list)
    metrics: dict[str, Figures] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    left_out: int = 0  # questions too long for data.max_length: they are in no figure

    @property
    def samples(self) -> int:
        return len(self.predictions)


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    device: torch.device,
    metrics: Sequence[str] = ("exact_match",),
) -> EvalReport:
    """Collective: every worker passes its own batches, all receive the whole report."""
    mine: list[Record] = []
    for batch in batches:
        ids = greedy(model, batch.to(device), max_new_tokens, int(tokenizer.eos_token_id))
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        mine += [score(record, text) for record, text in zip(batch.meta["records"], texts, strict=True)]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return summarize([record for part in parts for record in part], metrics)


def score(record: Record, text: str) -> Record:
    """What is kept of one question: its record, the prediction, and whether that is correct."""
    kept = {k: record[k] for k in ("id", "key", "type", "question", "answer", "answers")}
    return kept | {"prediction": text.strip(), "correct": is_correct(text, record["answers"])}


def summarize(predictions: Sequence[Record], metrics: Sequence[str] = ("exact_match",)) -> EvalReport:
    """Accuracy, counts and the named metrics, over all and by question type; also of predictions that were kept."""
    rows = by_type(predictions) if predictions else {}
    correct = np.array([record["correct"] for record in predictions], bool)
    accuracy = {kind: float(correct[numbers].mean()) for kind, numbers in rows.items()}
    figures, skipped = measure(predictions, metrics)
    return EvalReport(
        accuracy, {kind: len(numbers) for kind, numbers in rows.items()}, list(predictions), figures, skipped
    )
