"""What a model is asked: image files and rows of any layout -> Questions, batch by batch, in the order of the input.

In: a file, folder, glob, URI or hub data set id. Out: Pieces, which one task each reads alone; of a Piece lists of
Questions; of such a list a Batch for decoding. What cannot be read or asked is a Question with an error, in its place.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice

from smolray import storage
from smolray.config import ColumnsConfig, ConfigError, DataConfig
from smolray.data.batch import Batch
from smolray.data.collate import Group, collate_prompts
from smolray.data.encode import EncodeError, Encoder
from smolray.data.formats.discover import image_files, is_hub, list_read_tasks, read_rows, resolve
from smolray.data.formats.images import ImageReader, folder_of
from smolray.data.formats.layouts import own_id, parse_questions
from smolray.data.formats.registry import FORMATS
from smolray.data.formats.source import IMAGE_PARTS, Raw, ReadTask, Source, SourceError, is_wrong_layout
from smolray.data.sample import Sample, SampleError, ShardRow, image_key
from smolray.data.shards import MANIFEST, read_manifest
from smolray.data.tiles import image_size

READ_TASK_BYTES = 32 * 2**20
LOOKED_AT = 16  # rows that are looked at before a model is loaded


@dataclass(frozen=True)
class Asking:
    """What is asked of each image or row: `prompts` as `parse_questions` takes them, and how the data are read."""

    data: DataConfig
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """What one task reads: a unit of data files, or the `images` inside the folder `unit.root`; with an `error` it
    cannot be read at all.
    """

    task: ReadTask
    images: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Question:
    """One thing asked: of the file `path`, a row or an image called `id`.

    `error`: "reason: message", where it cannot be asked.
    """

    id: str
    path: str
    sample: Sample | None = None
    error: str = ""

    @property
    def prompt(self) -> str:
        """The last thing said before the answer."""
        turns = self.sample.conversation.messages[:-1] if self.sample else ()
        return turns[-1].text.strip() if turns else ""


@dataclass(frozen=True)
class Asked:
    """A Question on its way through decoding: `place` in the batch's conversations, -1 where it is not decoded."""

    id: str
    path: str
    prompt: str
    error: str = ""
    place: int = -1


def find_pieces(source: str, asking: Asking, images_each: int) -> tuple[list[Piece], Asking]:
    """The pieces of `source` in order, and what is asked of them.

    A folder with data files and images is read by its data files.

    Raises SourceError where there is nothing to read, ConfigError where a column is named for image files.
    """
    data = asking.data
    named_image = source.lower().rpartition(".")[2] in IMAGE_PARTS  # `photos/cat.jpg` looks like a hub id
    if data.format == "auto" and (named_image or not is_hub(source, data)):
        if storage.exists(storage.join(source, MANIFEST)):
            return [*_pieces_of(_shards(storage.absolute(source)))], asking
        images, root = image_files(source if storage.exists(source) else source.partition("#")[0])
        if images:
            if data.columns != ColumnsConfig():
                raise ConfigError(
                    f"{source} holds image files, which have no columns: leave data.columns (--question-column) away"
                )
            task = ReadTask("images", root, "", root, 0)
            return [Piece(task, tuple(images[n : n + images_each])) for n in range(0, len(images), images_each)], asking
    return [*_pieces_of(resolve(source, data))], asking


def check_pieces(source: str, pieces: Sequence[Piece], asking: Asking) -> None:
    """Fail before a model is loaded where there are no rows, or the first all lack the columns. Raises SourceError."""
    first = [*islice(chain.from_iterable(read_questions(piece, asking) for piece in pieces), LOOKED_AT)]
    if not first:
        raise SourceError(f"{source} holds no rows")
    if all(is_wrong_layout(q.error.partition(":")[0]) for q in first):
        raise SourceError(f"{first[0].path}: {first[0].error}")


def read_questions(piece: Piece, asking: Asking) -> Iterator[Question]:
    """The questions of a piece, in order."""
    task = piece.task
    if piece.error:
        yield Question(task.name, task.uri, error=f"torn_file: {piece.error}")
        return
    rows = (Raw(n, {"image": name}, name) for n, name in enumerate(piece.images)) if piece.images else _rows(task)
    reader = ImageReader(task.root if piece.images else folder_of(task.uri), task.root, asking.data.max_image_pixels)
    for raw in rows:
        path = storage.join(task.root, raw.name) if piece.images else task.uri
        name = raw.name if piece.images else f"{task.name}#{raw.name or raw.row}"
        try:
            if raw.reason:
                raise SampleError(raw.reason, raw.message)
            for sample in parse_questions(raw.record, name, asking.data, reader, asking.prompts):
                yield Question(sample.conversation.id, path, sample)
        except SampleError as error:
            yield Question(_own_id(raw, asking.data) or name, path, error=f"{error.reason}: {error}")


def collate_questions(
    questions: Sequence[Question], encoder: Encoder, max_new_tokens: int
) -> tuple[Batch | None, list[Asked]]:
    """A batch for decoding, those about the same images in one sequence, and each question with its place in it; None
    where none can be asked.

    `encoder.max_length` is the model's context, which prompt and answer share.
    """
    rows: dict[str, list[int]] = {}
    errors: dict[int, str] = {}
    for number, question in enumerate(questions):
        if question.sample is None:
            continue
        images, conversation = question.sample.images, question.sample.conversation
        try:
            length = len(encoder.prompt(conversation, [encoder.tiler.grid(*image_size(image)) for image in images]))
        except EncodeError as error:
            errors[number] = f"not_encoded: {error}"
            continue
        if length + max_new_tokens > encoder.max_length:
            errors[number] = (
                f"too_long: a prompt of {length} tokens and {max_new_tokens} new ones; the model's context holds {encoder.max_length}: "
                "lower image.max_tiles, or --max-new-tokens"
            )
            continue
        rows.setdefault(image_key(images, conversation), []).append(number)
    order = [number for numbers in rows.values() for number in numbers]
    places = {number: place for place, number in enumerate(order)}
    groups = [_group(key, [questions[n].sample for n in numbers]) for key, numbers in rows.items()]
    asked = [Asked(q.id, q.path, q.prompt, errors.get(n, q.error), places.get(n, -1)) for n, q in enumerate(questions)]
    return (collate_prompts(groups, encoder) if groups else None), asked


def _group(key: str, samples: Sequence[Sample | None]) -> Group:
    there = [s for s in samples if s is not None]
    return Group(ShardRow(key, there[0].images, tuple(s.conversation for s in there)), tuple(range(len(there))))


def _rows(task: ReadTask) -> Iterator[Raw]:
    """The rows of a unit; where its file turns out to be torn, a row that says so ends them."""
    row = task.first_row - 1
    try:
        for raw in read_rows(task):
            row = raw.row
            yield raw
    except (SourceError, OSError) as error:
        yield Raw(row + 1, {}, reason="torn_file", message=f"{task.uri} cannot be read beyond row {row + 1}: {error}")


def _own_id(raw: Raw, data: DataConfig) -> str:
    try:
        return own_id(raw.record, data)
    except SampleError:
        return ""


def _shards(folder: str) -> Source:
    files = read_manifest(folder).files
    return Source("parquet", tuple((storage.join(folder, f.name), f.bytes) for f in files), folder, "")


def _pieces_of(source: Source) -> Iterator[Piece]:
    """Units of a source, file by file: one that cannot be opened does not keep the others from being read."""
    if not FORMATS[source.format].suffixes:  # not made of files
        yield from map(Piece, list_read_tasks(source))
        return
    for file in source.files:
        uri = file[0]
        try:
            yield from map(Piece, list_read_tasks(replace(source, files=(file,)), READ_TASK_BYTES))
        except SourceError as error:
            yield Piece(
                ReadTask(source.format, uri, uri[len(source.root) :].strip("/"), source.root, 0), error=str(error)
            )
