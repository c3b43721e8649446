"""Distributed evaluation: each worker decodes its share of the validation micro-batches, rank 0 gathers predictions and scores.

In: an engine's model and a stream of prompts. Out: an EvalReport: metrics over all and by question type, and every prediction.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedTokenizerBase

from smolray import storage
from smolray.data.collate import Batch
from smolray.evaluate.generate import greedy
from smolray.evaluate.metrics import Figures, Record, by_type, is_correct, measure


@dataclass(frozen=True)
class EvalReport:
    """`accuracy` (exact match) and `counts` by question type, with "overall"; `metrics`: name -> question type -> value, low, high, samples;
    `skipped`: why a metric is missing, by its name; `predictions` hold id, key, type, question, prediction, answer, answers, correct."""

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
    return EvalReport(accuracy, {kind: len(numbers) for kind, numbers in rows.items()}, list(predictions), figures, skipped)


def read_predictions(run_dir: str, step: int) -> list[Record]:
    """The predictions that an evaluation at `step` kept. Raises FileNotFoundError."""
    data = storage.read_bytes(predictions_uri(run_dir, step))
    return pq.read_table(pa.BufferReader(data)).to_pylist()


def prediction_steps(run_dir: str) -> list[int]:
    """The steps whose predictions are kept, in order."""
    names = [f.base_name for f in storage.list_files(storage.join(run_dir, "predictions"))]
    return sorted(int(name[5:-8]) for name in names if name.startswith("step-") and name.endswith(".parquet"))


def predictions_uri(run_dir: str, step: int) -> str:
    """Where the predictions of an evaluation at `step` are kept."""
    return storage.join(run_dir, "predictions", f"step-{step:08d}.parquet")


def write_predictions(uri: str, predictions: Sequence[Record]) -> None:
    """Keep predictions as Parquet: id, key, type, question, prediction, answer, answers, correct."""
    text = [(n, pa.string()) for n in ("id", "key", "type", "question", "prediction", "answer")]
    schema = pa.schema([*text, ("answers", pa.list_(pa.string())), ("correct", pa.bool_())])
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(predictions), schema=schema), sink, compression="zstd")
    storage.write_bytes(uri, sink.getvalue().to_pybytes())
