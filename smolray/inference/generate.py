"""Answers for files, folders and data sets, over Ray Data: tasks read and cut the images, one model an actor answers,
the input's order is kept.

In: a ModelSource and QuestionTasks. Out: tables of GENERATED_SCHEMA as they come, and a Parquet or JSON lines file that is
there whole or not at all.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import islice
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from ray.data import ActorPoolStrategy, DataContext

from smolray import storage
from smolray.cluster.connect import connect
from smolray.config import ConfigError
from smolray.data.batch import Batch
from smolray.data.encode import Encoder
from smolray.data.ray_jobs import at_once, quiet_context
from smolray.inference.predictor import Decoding, ModelSource, Predictor, answer_rows
from smolray.inference.questions import PlacedQuestion, PromptSettings, QuestionTask, collate_questions, read_questions
from smolray.planner.shapes import shape_of
from smolray.pretrained import DTYPES

GENERATED_SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "path", "prompt", "text", "error")])
CPUS_OF_A_MODEL = 0.5  # the tasks that read find the rest
MEMORY_OF_A_MODEL = 2  # times its weights: what it computes comes on top


class Holder(Protocol):
    """A model on a device."""

    def rows(self, batch: Batch | None, asked: Sequence[PlacedQuestion]) -> pa.Table:
        """A row for each of `asked`; `batch` holds those of them that could be read."""
        ...


Maker = Callable[[torch.device], Holder]


class Answers:
    """A Holder that answers. In: Batches of prompts. Out: rows of GENERATED_SCHEMA."""

    def __init__(self, source: ModelSource, decoding: Decoding, device: torch.device):
        self.answerer = Predictor(source, decoding, device)

    def rows(self, batch: Batch | None, asked: Sequence[PlacedQuestion]) -> pa.Table:
        return pa.Table.from_pylist(answer_rows(self.answerer, batch, asked), schema=GENERATED_SCHEMA)


def answers(
    source: ModelSource,
    question_tasks: Sequence[QuestionTask],
    prompt_settings: PromptSettings,
    decoding: Decoding,
    batch_size: int,
    workers: int | None = None,
) -> Iterator[pa.Table]:
    """Tables of GENERATED_SCHEMA, a row for each question, in order."""
    return over_batches(
        source,
        question_tasks,
        prompt_settings,
        batch_size,
        decoding.max_new_tokens,
        workers,
        partial(Answers, source, decoding),
    )


def over_batches(
    source: ModelSource,
    question_tasks: Sequence[QuestionTask],
    prompt_settings: PromptSettings,
    batch_size: int,
    max_new_tokens: int,
    workers: int | None,
    make: Maker,
) -> Iterator[pa.Table]:
    """The tables that a holder of the model, made on its device by `make`, gives for each batch, in order.

    What one batch holds is done in this process, more over Ray.

    `workers`: models held at a time; default: one a GPU, else one a core as far as the memory goes.
    """
    questions = max(1, len(prompt_settings.prompts)) * sum(len(task.images) for task in question_tasks)
    if all(task.images for task in question_tasks) and questions <= batch_size:
        yield from here(source, question_tasks, prompt_settings, batch_size, max_new_tokens, make)
        return
    connect()
    gpus = int(ray.cluster_resources().get("GPU", 0)) if source.config.resources.use_gpu != "no" else 0
    models = workers or (gpus or _models_on_cpus(source))
    if all(task.images for task in question_tasks):
        models = min(models, -(-questions // batch_size))
    made = _dataset(source, question_tasks, prompt_settings, batch_size, max_new_tokens, models, bool(gpus), make)
    for batch in made.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for table in batch["table"]:
            yield pa.ipc.open_stream(table.as_buffer()).read_all()


@contextmanager
def writing(uri: str) -> Iterator[Callable[[pa.Table], None]]:
    """A function that adds a table to the file `uri`, Parquet or JSON lines by its suffix; the file is there once the
    block has ended without an error.
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
    """Raise ConfigError unless the suffix says how to write answers."""
    if not uri.endswith((".parquet", ".jsonl")):
        raise ConfigError(f"--out {uri}: expected a file that ends in .parquet or .jsonl")


def _batches(
    task: QuestionTask, prompt_settings: PromptSettings, encoder: Encoder, size: int, max_new_tokens: int
) -> Iterator[tuple[Batch | None, list[PlacedQuestion]]]:
    questions = read_questions(task, prompt_settings)
    while some := [*islice(questions, size)]:
        yield collate_questions(some, encoder, max_new_tokens)


def here(
    source: ModelSource,
    question_tasks: Sequence[QuestionTask],
    prompt_settings: PromptSettings,
    batch_size: int,
    max_new_tokens: int,
    make: Maker,
) -> Iterator[pa.Table]:
    """The same in this process, without Ray."""
    gpu = torch.cuda.is_available() and source.config.resources.use_gpu != "no"
    held = make(torch.device("cuda" if gpu else "cpu"))
    for task in question_tasks:
        for batch, asked in _batches(task, prompt_settings, source.encoder(), batch_size, max_new_tokens):
            yield held.rows(batch, asked)


def _dataset(
    source: ModelSource,
    question_tasks: Sequence[QuestionTask],
    prompt_settings: PromptSettings,
    batch_size: int,
    max_new_tokens: int,
    models: int,
    gpu: bool,
    make: Maker,
) -> ray.data.Dataset:
    held, config = ray.put(list(question_tasks)), source.config

    def read(table: pa.Table) -> Iterator[pa.Table]:
        for number in table["item"].to_pylist():
            for batch, asked in _batches(
                ray.get(held)[number], prompt_settings, source.encoder(), batch_size, max_new_tokens
            ):
                yield pa.table(
                    {
                        "batch": pa.array([batch.to_bytes() if batch else None], pa.large_binary()),
                        "asked": [json.dumps([asdict(a) for a in asked])],
                    }
                )

    context = quiet_context().copy()
    context.execution_options.preserve_order = True
    # a block a row, and a row a batch, or a small data set would be one block, and one actor's work
    context.target_max_block_size = 1
    with DataContext.current(context):
        return (
            ray.data.from_items(list(range(len(question_tasks))), override_num_blocks=len(question_tasks))
            .map_batches(
                read,
                batch_format="pyarrow",
                batch_size=None,
                num_cpus=config.data.num_cpus_per_task,
                compute=at_once(1, len(question_tasks)),
            )
            .map_batches(
                _Held,
                fn_constructor_args=(make, gpu),
                batch_format="pyarrow",
                batch_size=1,
                compute=ActorPoolStrategy(size=models),
                num_cpus=CPUS_OF_A_MODEL,
                num_gpus=1 if gpu else None,
            )
        )


class _Held:
    """A Ray Data actor that holds one model.

    In: one row with a Batch and what is asked in it. Out: one row with the model's table.
    """

    def __init__(self, make: Maker, gpu: bool):
        if not gpu:
            torch.set_num_threads(1)  # there is an actor for each core
        self.held = make(torch.device("cuda" if gpu else "cpu"))

    def __call__(self, table: pa.Table) -> pa.Table:
        data, asked = table["batch"][0].as_py(), [PlacedQuestion(**a) for a in json.loads(table["asked"][0].as_py())]
        rows, sink = self.held.rows(Batch.from_bytes(data) if data else None, asked), pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_table(rows)
        return pa.table({"table": pa.array([sink.getvalue().to_pybytes()], pa.large_binary())})


def _models_on_cpus(source: ModelSource) -> int:
    """One a core, as far as they fit into the memory of the cluster."""
    try:
        weights = shape_of(source.config.model).parameters * DTYPES[source.config.model.dtype].itemsize
    except ConfigError:  # its size is not known
        weights = 1
    resources = ray.cluster_resources()
    return max(1, min(int(resources.get("CPU", 1)), int(resources.get("memory", 0) // (MEMORY_OF_A_MODEL * weights))))
