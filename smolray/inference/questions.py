"""Questions to a model: image files and rows of any layout -> Questions, batch by batch, in the order of the input.

Flow: a file, folder, glob, URI or hub data set id is cut into QuestionTasks (each is read by one worker alone). A task
is read as Questions, and a list of Questions becomes a Batch for decoding. A row that cannot be read or encoded is a
Question with an error, at its place in the order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice

from smolray import storage
from smolray.config import ColumnsConfig, ConfigError, DataConfig
from smolray.data.batch import Batch
from smolray.data.collate import Group, collate_prompts
from smolray.data.encode import EncodeError, Encoder
from smolray.data.formats.columns import id_if_any
from smolray.data.formats.discover import image_files, is_hub, list_read_tasks, read_rows, resolve
from smolray.data.formats.images import ImageReader, image_reader
from smolray.data.formats.questions import parse_questions
from smolray.data.formats.registry import FORMATS
from smolray.data.formats.source import IMAGE_PARTS, Raw, ReadTask, Source, SourceError, is_wrong_layout
from smolray.data.sample import Sample, SampleError, ShardRow, image_key
from smolray.data.shards import MANIFEST, read_manifest
from smolray.data.tiles import image_size

READ_TASK_BYTES = 32 * 2**20
CHECKED_QUESTIONS = 16  # read before a model is loaded


@dataclass(frozen=True)
class PromptSettings:
    """The prompts for each image or row (see `parse_questions`), and how the data are read."""

    data: DataConfig
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True)
class QuestionTask:
    """A part of the input that one worker reads: a ReadTask of data files, or `images` in the folder `source.root`.

    `error`: why it cannot be read at all; else empty.
    """

    source: ReadTask
    images: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Question:
    """One question about an image, or one row, of the file `path`.

    `error`: "reason: message" where it cannot be read or encoded.
    """

    id: str
    path: str
    sample: Sample | None = None
    error: str = ""

    @property
    def prompt(self) -> str:
        """The text of the last turn before the answer."""
        turns = self.sample.conversation.messages[:-1] if self.sample else ()
        return turns[-1].text.strip() if turns else ""


@dataclass(frozen=True)
class PlacedQuestion:
    """A Question and its place among the conversations of a Batch; -1 where it is not decoded."""

    id: str
    path: str
    prompt: str
    error: str = ""
    place: int = -1


def find_question_tasks(source: str, settings: PromptSettings, images_each: int) -> list[QuestionTask]:
    """The tasks of `source` in order. In a folder with data files and images, only the data files are read.

    Raises:
        SourceError: there is nothing to read.
        ConfigError: a column is named for image files.
    """
    data = settings.data
    named_image = source.lower().rpartition(".")[2] in IMAGE_PARTS  # `photos/cat.jpg` looks like a hub id
    if data.format == "auto" and (named_image or not is_hub(source, data)):
        if storage.exists(storage.join(source, MANIFEST)):
            return [*_question_tasks(_shards(storage.absolute(source)))]

        images, root = image_files(source if storage.exists(source) else source.partition("#")[0])
        if images:
            if data.columns != ColumnsConfig():
                raise ConfigError(
                    f"{source} holds image files, which have no columns: do not set data.columns (--question-column)"
                )
            folder = ReadTask("images", root, "", root, 0)
            starts = range(0, len(images), images_each)
            return [QuestionTask(folder, tuple(images[n : n + images_each])) for n in starts]
    return [*_question_tasks(resolve(source, data))]


def check_question_tasks(source: str, tasks: Sequence[QuestionTask], settings: PromptSettings) -> None:
    """Raise SourceError, before a model is loaded, where there are no rows or the first rows all lack the columns."""
    questions = chain.from_iterable(read_questions(task, settings) for task in tasks)
    first = [*islice(questions, CHECKED_QUESTIONS)]
    if not first:
        raise SourceError(f"{source} holds no rows")

    if all(is_wrong_layout(q.error.partition(":")[0]) for q in first):
        raise SourceError(f"{first[0].path}: {first[0].error}")


def read_questions(task: QuestionTask, settings: PromptSettings) -> Iterator[Question]:
    """The questions of a task, in order."""
    source, data = task.source, settings.data
    if task.error:
        yield Question(source.name, source.uri, error=f"torn_file: {task.error}")
        return

    rows = (Raw(n, {"image": name}, name) for n, name in enumerate(task.images)) if task.images else _rows(source)
    if task.images:  # the person named them, so links are followed
        reader = ImageReader(source.root, source.root, data.max_image_pixels, anywhere=True)
    else:
        reader = image_reader(source, data)

    for raw in rows:
        path = storage.join(source.root, raw.name) if task.images else source.uri
        name = raw.name if task.images else f"{source.name}#{raw.name or raw.row}"
        try:
            if raw.reason:
                raise SampleError(raw.reason, raw.message)
            for sample in parse_questions(raw.record, name, data, reader, settings.prompts):
                yield Question(sample.conversation.id, path, sample)
        except SampleError as error:
            yield Question(id_if_any(raw.record, data) or name, path, error=f"{error.reason}: {error}")


def collate_questions(
    questions: Sequence[Question], encoder: Encoder, max_new_tokens: int
) -> tuple[Batch | None, list[PlacedQuestion]]:
    """A Batch for decoding, and each question with its place in it. There is no Batch if no question can be encoded.

    Questions about the same images share one sequence. Prompt and answer together must fit into
    `encoder.max_length`, the model's context.
    """
    samples: dict[int, Sample] = {}
    errors: dict[int, str] = {}
    for number, question in enumerate(questions):
        if question.sample is None:
            continue
        if error := _encoding_error(question.sample, encoder, max_new_tokens):
            errors[number] = error
        else:
            samples[number] = question.sample

    rows: dict[str, list[int]] = {}
    for number, sample in samples.items():
        rows.setdefault(image_key(sample.images, sample.conversation), []).append(number)
    groups = [_group(key, [samples[n] for n in numbers]) for key, numbers in rows.items()]
    order = [number for numbers in rows.values() for number in numbers]
    places = {number: place for place, number in enumerate(order)}

    placed = [
        PlacedQuestion(q.id, q.path, q.prompt, errors.get(n, q.error), places.get(n, -1))
        for n, q in enumerate(questions)
    ]
    return (collate_prompts(groups, encoder) if groups else None), placed


def _encoding_error(sample: Sample, encoder: Encoder, max_new_tokens: int) -> str:
    """Why no answer can be generated for a sample; empty where one can."""
    grids = [encoder.tiler.grid(*image_size(image)) for image in sample.images]
    try:
        length = len(encoder.prompt(sample.conversation, grids))
    except EncodeError as error:
        return f"not_encoded: {error}"
    if length + max_new_tokens > encoder.max_length:
        return (
            f"too_long: a prompt of {length} tokens and {max_new_tokens} new ones; the model's context holds "
            f"{encoder.max_length}: lower image.max_tiles, or --max-new-tokens"
        )
    return ""


def _group(key: str, samples: Sequence[Sample]) -> Group:
    conversations = tuple(s.conversation for s in samples)
    return Group(ShardRow(key, samples[0].images, conversations), tuple(range(len(samples))))


def _rows(task: ReadTask) -> Iterator[Raw]:
    """The rows of a read task. Where its file turns out to be damaged, the last row has the error."""
    row = task.first_row - 1
    try:
        for raw in read_rows(task):
            row = raw.row
            yield raw
    except (SourceError, OSError) as error:
        yield Raw(row + 1, {}, reason="torn_file", message=f"{task.uri} cannot be read beyond row {row + 1}: {error}")


def _shards(folder: str) -> Source:
    files = read_manifest(folder).files
    return Source("parquet", tuple((storage.join(folder, f.name), f.bytes) for f in files), folder, "")


def _question_tasks(source: Source) -> Iterator[QuestionTask]:
    """The tasks of a source, file by file: where one file cannot be opened, the others are still read."""
    if not FORMATS[source.format].suffixes:  # not made of files
        yield from map(QuestionTask, list_read_tasks(source))
        return

    for file in source.files:
        uri = file[0]
        try:
            yield from map(QuestionTask, list_read_tasks(replace(source, files=(file,)), READ_TASK_BYTES))
        except SourceError as error:
            whole = ReadTask(source.format, uri, uri[len(source.root) :].strip("/"), source.root, 0)
            yield QuestionTask(whole, error=str(error))
