"""Runs a model over many questions, in this process or over Ray Data, in the order of the input.

In: an InferenceJob. Out: one table for each batch. Over Ray, tasks read files and encode images, and each of several
actors holds one model.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Protocol

import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy, DataContext

from smolray.cluster.connect import connect, native_errors_in_log
from smolray.config import ConfigError
from smolray.data.batch import Batch
from smolray.data.ray_context import at_once, cluster_capacity, quiet_context
from smolray.inference.predictor import ModelSource
from smolray.inference.questions import PlacedQuestion, PromptSettings, QuestionTask, collate_questions, read_questions
from smolray.planner.model_files import shape_of
from smolray.pretrained import DTYPES

CPUS_PER_MODEL = 0.5  # the tasks that read get the other CPUs
MEMORY_PER_MODEL = 2  # in sizes of its weights: activations need memory too


class BatchModel(Protocol):
    """A model on a device."""

    def rows(self, batch: Batch | None, questions: Sequence[PlacedQuestion]) -> pa.Table:
        """A row for each question; `batch` holds those that could be read."""
        ...


ModelFactory = Callable[[torch.device], BatchModel]


@dataclass(frozen=True)
class InferenceJob:
    """The questions for a model, and how the model is made.

    Attributes:
        max_new_tokens: prompt and answer together must fit into the model's context.
        make_model: called with the device, in each process that holds a model.
    """

    source: ModelSource
    question_tasks: Sequence[QuestionTask]
    prompt_settings: PromptSettings
    batch_size: int
    max_new_tokens: int
    make_model: ModelFactory

    @property
    def questions(self) -> int | None:
        """The number of questions; None where it is known only after reading the data."""
        if not all(task.images for task in self.question_tasks):
            return None
        return max(1, len(self.prompt_settings.prompts)) * sum(len(task.images) for task in self.question_tasks)

    def batches(self, task: QuestionTask) -> Iterator[tuple[Batch | None, list[PlacedQuestion]]]:
        """The questions of a task, `batch_size` at a time."""
        questions = read_questions(task, self.prompt_settings)
        while some := [*islice(questions, self.batch_size)]:
            yield collate_questions(some, self.source.encoder(), self.max_new_tokens)


def run_job(job: InferenceJob, workers: int | None = None) -> Iterator[pa.Table]:
    """Yield the model's table for each batch, in order. Runs over Ray unless one batch holds all questions.

    `workers`: models at a time; default: one for each GPU, without GPUs one for each core that has memory for it.
    """
    if job.questions is not None and job.questions <= job.batch_size:
        yield from run_locally(job)
        return

    connect()
    gpus = int(cluster_capacity().get("GPU", 0)) if job.source.config.resources.use_gpu != "no" else 0
    models = workers or gpus or _models_on_cpus(job.source)
    if job.questions is not None:
        models = min(models, -(-job.questions // job.batch_size))

    dataset = _dataset(job, models, bool(gpus))
    with native_errors_in_log():
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for table in batch["table"]:
                yield pa.ipc.open_stream(table.as_buffer()).read_all()


def run_locally(job: InferenceJob) -> Iterator[pa.Table]:
    """Yield the same tables in this process, without Ray."""
    gpu = torch.cuda.is_available() and job.source.config.resources.use_gpu != "no"
    model = job.make_model(torch.device("cuda" if gpu else "cpu"))
    for task in job.question_tasks:
        for batch, questions in job.batches(task):
            yield model.rows(batch, questions)


def _dataset(job: InferenceJob, models: int, gpu: bool) -> ray.data.Dataset:
    held = ray.put(job)

    def read(table: pa.Table) -> Iterator[pa.Table]:
        job: InferenceJob = ray.get(held)
        for number in table["item"].to_pylist():
            for batch, questions in job.batches(job.question_tasks[number]):
                encoded = pa.array([batch.to_bytes() if batch else None], pa.large_binary())
                yield pa.table({"batch": encoded, "questions": [json.dumps([asdict(one) for one in questions])]})

    context = quiet_context().copy()
    context.execution_options.preserve_order = True
    # One batch in a row and one row in a block: otherwise a small data set is one block, and one actor gets all of it.
    context.target_max_block_size = 1

    tasks = len(job.question_tasks)
    with DataContext.current(context):
        return (
            ray.data.from_items(list(range(tasks)), override_num_blocks=tasks)
            .map_batches(
                read,
                batch_format="pyarrow",
                batch_size=None,
                num_cpus=job.source.config.data.num_cpus_per_task,
                compute=at_once(1, tasks),
            )
            .map_batches(
                _ModelActor,
                fn_constructor_args=(job.make_model, gpu),
                batch_format="pyarrow",
                batch_size=1,
                compute=ActorPoolStrategy(size=models),
                num_cpus=CPUS_PER_MODEL,
                num_gpus=1 if gpu else None,
            )
        )


class _ModelActor:
    """A Ray Data actor that holds one model.

    In: one row with a Batch and its questions. Out: one row with the model's table.
    """

    def __init__(self, make_model: ModelFactory, gpu: bool):
        if not gpu:
            torch.set_num_threads(1)  # there is an actor for each core
        self.model = make_model(torch.device("cuda" if gpu else "cpu"))

    def __call__(self, table: pa.Table) -> pa.Table:
        data = table["batch"][0].as_py()
        questions = [PlacedQuestion(**fields) for fields in json.loads(table["questions"][0].as_py())]
        rows = self.model.rows(Batch.from_bytes(data) if data else None, questions)

        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_table(rows)
        return pa.table({"table": pa.array([sink.getvalue().to_pybytes()], pa.large_binary())})


def _models_on_cpus(source: ModelSource) -> int:
    """The number of models for CPUs: one for each core, as far as they fit into the memory of the cluster."""
    try:
        weights = shape_of(source.config.model).parameters * DTYPES[source.config.model.dtype].itemsize
    except ConfigError:  # its size is not known
        weights = 1

    resources = cluster_capacity()
    by_memory = int(resources.get("memory", 0) // (MEMORY_PER_MODEL * weights))
    return max(1, min(int(resources.get("CPU", 1)), by_memory))
