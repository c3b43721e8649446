"""Predictions of an evaluation as Parquet in the run's folder."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from smolray import storage
from smolray.run.folder import RunFolder

Prediction = dict[str, Any]  # id, key, type, question, prediction, answer, answers, correct


def read_predictions(run_dir: str, step: int) -> list[Prediction]:
    """The predictions that an evaluation at `step` kept. Raises FileNotFoundError."""
    data = storage.read_bytes(RunFolder(run_dir).predictions_of(step))
    return pq.read_table(pa.BufferReader(data)).to_pylist()


def prediction_steps(run_dir: str) -> list[int]:
    """The steps whose predictions are kept, in order."""
    names = [f.base_name for f in storage.list_files(RunFolder(run_dir).predictions)]
    return sorted(int(name[5:-8]) for name in names if name.startswith("step-") and name.endswith(".parquet"))


def write_predictions(run_dir: str, step: int, predictions: Sequence[Prediction]) -> None:
    """Keep predictions as Parquet: id, key, type, question, prediction, answer, answers, correct."""
    text = [(n, pa.string()) for n in ("id", "key", "type", "question", "prediction", "answer")]
    schema = pa.schema([*text, ("answers", pa.list_(pa.string())), ("correct", pa.bool_())])
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(predictions), schema=schema), sink, compression="zstd")
    storage.write_bytes(RunFolder(run_dir).predictions_of(step), sink.getvalue().to_pybytes())
