"""Which files a source consists of, how they are cut into read tasks, and the raw rows of a task.

In: a path, glob, URI or hub data set id. Out: a Source, then its ReadTasks (about READ_TASK_BYTES each, so that any
worker can read one alone), then the Raw rows of a task as a stream. The formats themselves are in registry.py.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import asdict

from smolray import storage
from smolray.config import DataConfig
from smolray.data.formats.arrow import ARROW, files_of_state
from smolray.data.formats.coco import COCO, object_files
from smolray.data.formats.compression import without_compression
from smolray.data.formats.damage import damaged
from smolray.data.formats.hub import HUB, resolve_hub
from smolray.data.formats.imagefolder import IMAGEFOLDER, class_files
from smolray.data.formats.jsonl import JSONL
from smolray.data.formats.listing import File, is_image, is_text, list_source, once, shown
from smolray.data.formats.registry import FORMATS, named_format
from smolray.data.formats.source import (
    READ_TASK_BYTES,
    UNREAD_IMAGE_PARTS,
    Format,
    Raw,
    ReadTask,
    Source,
    SourceError,
)
from smolray.data.formats.splits import files_of_split, split_of


def resolve(source: str, data: DataConfig) -> Source:
    """Find the files behind `source`: a file, a folder, a glob, or a hub data set id.

    Globs are such as `data/train-*.parquet` and `{000..009}.tar`. `#split` after the source, else `data.split`, chooses
    a split. What exists is taken as it is named, whatever characters are in its name.

    Raises:
        ConfigError: data.format names no format.
        SourceError: there is nothing to read, or it is not clear what is meant.
    """
    source, split = _split_suffix(source, data)
    if is_hub(source, data):
        return resolve_hub(source, split or "train", data.revision)

    source = storage.absolute(source).rstrip("/")
    found, root = list_source(source)
    chosen, files = _data_files(source, found, root, data)
    files = once(files_of_split(source, root, files, split))
    if chosen is ARROW:
        files = files_of_state(files)
    if unreadable := [file for file in files if not is_text(file.uri)]:
        raise SourceError(f"the name of {shown(unreadable[0].uri)} is not UTF-8; rename the file")

    identity = repr([(chosen.name, *file) for file in [*files, *_images(found, chosen, data)]])
    digest = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
    if chosen is IMAGEFOLDER:
        split = split if any(split_of(file.uri[len(root) :]) for file in files) else ""
        return Source(chosen.name, ((root, 0),), root, digest, split)
    return Source(chosen.name, tuple((file.uri, file.bytes) for file in files), root, digest, split)


def _data_files(source: str, found: list[File], root: str, data: DataConfig) -> tuple[Format, list[File]]:
    """The format of a source and its files of this format. Raises SourceError where there is none."""
    by_format = {
        f.name: [file for file in found if _is_of(file, f, f.suffixes)] for f in FORMATS.values() if f.suffixes
    }
    chosen = named_format(data)
    classes = class_files(found, root)
    if chosen is IMAGEFOLDER or (chosen is None and classes and not any(by_format.values())):
        if not classes:
            raise SourceError(f"{source} does not hold images in a folder for each class; files found: {_some(found)}")
        return IMAGEFOLDER, classes
    if chosen is None:
        chosen, files = _only_format(source, found, by_format)
        objects = object_files(files) if chosen is JSONL else []
        return (COCO, objects) if objects else (chosen, files)
    if chosen is COCO:
        by_format[COCO.name] = object_files(by_format[JSONL.name])
    files = by_format[chosen.name] or (found if len(found) == 1 else [])  # a single file may have any name
    if not files:
        raise SourceError(
            f"{source} holds no {chosen.name} file ({', '.join(chosen.suffixes)}); files found: {_some(found)}"
        )
    return chosen, files


def _images(found: list[File], chosen: Format, data: DataConfig) -> list[File]:
    """The images that rows may name, and the zips that may hold them: they are a part of the source."""
    if not chosen.names_images:
        return []
    if data.image_root:
        found = found + list_source(storage.absolute(data.image_root))[0]
    return [file for file in found if is_image(file.uri) or file.uri.lower().endswith(".zip")]


def image_files(source: str) -> tuple[list[str], str]:
    """The image files behind a file, folder or glob, as paths inside a folder, and that folder.

    Images of formats that are not read are among them, so that each is told. There are none where the source has data
    files, which come first; but a JSON or CSV file next to images counts as metadata. A single file that is no data
    file may have any name. Raises SourceError.
    """
    source = storage.absolute(source).rstrip("/")
    found, root = list_source(source)
    names = [file.uri for file in found]
    metadata = [file for file in found if any(_is_of(file, f, f.metadata_suffixes) for f in FORMATS.values())]
    data_files = [file for file in found if any(_is_of(file, f, f.suffixes) for f in FORMATS.values())]
    if len(data_files) > len(metadata):
        return [], root

    images = [n for n in names if is_image(n) or n.lower().rpartition(".")[2] in UNREAD_IMAGE_PARTS]
    images = [n for n in images if not n.rpartition("/")[2].startswith(".")]  # a glob lists hidden ones
    if len(names) == 1 and not metadata:
        images = names
    if not names:
        raise SourceError(f"{source} holds no file")
    return [name[len(root) :].strip("/") for name in images], root


def list_read_tasks(source: Source, task_bytes: int = READ_TASK_BYTES) -> list[ReadTask]:
    """Cut a source into read tasks. Raises SourceError.

    Reads the footers of Parquet files, and JSON and CSV files once from end to end; no image is read.
    """
    return list(iter_read_tasks(source, task_bytes))


def iter_read_tasks(source: Source, task_bytes: int = READ_TASK_BYTES) -> Iterator[ReadTask]:
    """Yield the same read tasks one by one, the first before the rest of the source is read. Raises SourceError."""
    for number, (uri, size) in enumerate(source.files):
        name = uri[len(source.root) :].strip("/")
        if not size and FORMATS[source.format].suffixes:
            raise damaged(uri, "it has no bytes", "its rows are lost")
        whole = ReadTask(source.format, uri, name, source.root, number, split=source.split, revision=source.revision)
        yield from FORMATS[source.format].cut(whole, size, task_bytes)


def read_rows(task: ReadTask) -> Iterator[Raw]:
    """Stream the raw rows of a read task; a row that cannot be read comes as a Raw with a reason.

    Memory does not grow with the task.
    """
    return FORMATS[task.format].read(task)


def read_tasks_fingerprint(tasks: list[ReadTask]) -> str:
    """A hash of the read tasks of a source: staged rows belong to exactly these tasks."""
    return hashlib.blake2b(repr([asdict(task) for task in tasks]).encode(), digest_size=8).hexdigest()


def is_hub(source: str, data: DataConfig) -> bool:
    """Whether `source` is a hub data set id: by data.format, or because it reads `owner/name` and no such file exists.

    Raises ConfigError where data.format names no format.
    """
    if chosen := named_format(data):
        return chosen is HUB
    return is_hub_id(source) and not storage.exists(source) and not storage.exists(source.partition("#")[0])


def _split_suffix(source: str, data: DataConfig) -> tuple[str, str]:
    """The source without its `#split`, and the split. What exists under the whole name has none."""
    match = re.fullmatch(r"(.+)#([\w.+-]+)", source)
    if match is None or storage.exists(storage.absolute(source)):
        return source, data.split
    return match[1], match[2]


def is_hub_id(source: str) -> bool:
    """Whether a text reads `owner/name`, with or without a split."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+(#[\w.-]+)?", source) is not None


def _is_of(file: File, data_format: Format, suffixes: tuple[str, ...]) -> bool:
    """Whether a file has one of these endings of a format, also before that of a compression."""
    name = without_compression(file.uri) if data_format.compressible else file.uri.lower()
    return name.endswith(suffixes)


def _only_format(source: str, found: list[File], by_format: dict[str, list[File]]) -> tuple[Format, list[File]]:
    """The one format of the files. Raises SourceError where there is none, or where several hold data."""
    there = [FORMATS[name] for name, files in by_format.items() if files]
    # A JSON or CSV file next to Parquet or tar files is common. It is metadata, not data.
    for chosen in reversed(list(there)):
        if len(there) > 1 and all(_is_of(file, chosen, chosen.metadata_suffixes) for file in by_format[chosen.name]):
            there.remove(chosen)

    if len(there) == 1:
        return there[0], by_format[there[0].name]
    if not there:
        endings = ", ".join(suffix for f in FORMATS.values() for suffix in f.suffixes)
        needed = (
            "; images need answers or captions: add a JSONL or CSV file that names them, or a folder for each class"
        )
        images = needed if _any_image(found) else ""
        raise SourceError(f"{source} holds no data file ({endings}); files found: {_some(found)}{images}")
    counts = ", ".join(f"{len(files)} {name}" for name, files in by_format.items() if files)
    raise SourceError(f"{source} holds {counts} files; expected files of one format, or set data.format")


def _any_image(found: list[File]) -> bool:
    return any(is_image(file.uri) for file in found)


def _some(found: list[File]) -> str:
    return ", ".join(shown(f.uri).rsplit("/", 1)[-1] for f in found[:8]) + (" …" if len(found) > 8 else "") or "none"
