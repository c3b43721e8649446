"""Answers for files, folders and data sets.

In: a ModelSource and QuestionTasks. Out: tables of GENERATED_SCHEMA in the order of the input, and a Parquet or JSON
lines file that exists only once it is complete.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from smolray import storage
from smolray.config import ConfigError
from smolray.data.batch import Batch
from smolray.inference.job import InferenceJob, run_job
from smolray.inference.predictor import Decoding, ModelSource, Predictor, answer_rows
from smolray.inference.questions import PlacedQuestion, PromptSettings, QuestionTask

GENERATED_SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "path", "prompt", "text", "error")])


class AnsweringModel:
    """A model that answers questions. In: Batches of prompts. Out: rows of GENERATED_SCHEMA."""

    def __init__(self, source: ModelSource, decoding: Decoding, device: torch.device):
        self.predictor = Predictor(source, decoding, device)

    def rows(self, batch: Batch | None, questions: Sequence[PlacedQuestion]) -> pa.Table:
        return pa.Table.from_pylist(answer_rows(self.predictor, batch, questions), schema=GENERATED_SCHEMA)


def answering_job(
    source: ModelSource,
    question_tasks: Sequence[QuestionTask],
    prompt_settings: PromptSettings,
    decoding: Decoding,
    batch_size: int,
) -> InferenceJob:
    """The InferenceJob that answers the questions."""
    make_model = partial(AnsweringModel, source, decoding)
    return InferenceJob(source, question_tasks, prompt_settings, batch_size, decoding.max_new_tokens, make_model)


def answers(
    source: ModelSource,
    question_tasks: Sequence[QuestionTask],
    prompt_settings: PromptSettings,
    decoding: Decoding,
    batch_size: int,
    workers: int | None = None,
) -> Iterator[pa.Table]:
    """Tables of GENERATED_SCHEMA, a row for each question, in order."""
    return run_job(answering_job(source, question_tasks, prompt_settings, decoding, batch_size), workers)


@contextmanager
def writing(uri: str) -> Iterator[Callable[[pa.Table], None]]:
    """Open the file `uri`, Parquet or JSON lines by its suffix, and yield a function that adds a table to it.

    The file exists only after the block has ended without an error.
    """
    require_suffix(uri)
    with storage.writing(uri) as file:
        if uri.endswith(".parquet"):
            with pq.ParquetWriter(file, GENERATED_SCHEMA, compression="zstd") as writer:
                yield writer.write_table
        else:
            yield lambda table: file.writelines(
                json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in table.to_pylist()
            )


def require_suffix(uri: str) -> None:
    """Raise ConfigError unless `uri` ends in .parquet or .jsonl."""
    if not uri.endswith((".parquet", ".jsonl")):
        raise ConfigError(f"--out {uri}: expected a file that ends in .parquet or .jsonl")
