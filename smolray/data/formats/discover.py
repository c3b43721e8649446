"""Which files a source consists of, how they are cut into read tasks, and the raw rows of a task.

In: a path, glob, URI or hub data set id. Out: a Source, then its ReadTasks (about READ_TASK_BYTES each, so that any
worker can read one alone), then the Raw rows of a task as a stream. The formats themselves are in registry.py.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import asdict
from fnmatch import fnmatch
from typing import NamedTuple

import pyarrow.fs as pafs

from smolray import storage
from smolray.config import DataConfig
from smolray.data.formats.compression import without_compression
from smolray.data.formats.damage import damaged
from smolray.data.formats.hub import HUB, resolve_hub
from smolray.data.formats.images import folder_of
from smolray.data.formats.registry import FORMATS, named_format
from smolray.data.formats.source import IMAGE_PARTS, READ_TASK_BYTES, Format, Raw, ReadTask, Source, SourceError

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
}


class File(NamedTuple):
    """A file of a source, as it is listed."""

    uri: str
    bytes: int
    changed: int  # time of the last change in ns, 0 where it is not known


def resolve(source: str, data: DataConfig) -> Source:
    """Find the files behind `source`: a file, a folder, a glob, or a hub data set id.

    Globs are such as `data/train-*.parquet` and `{000..009}.tar`. `#split` after the source, else `data.split`, chooses
    a split.

    Raises:
        ConfigError: data.format names no format.
        SourceError: there is nothing to read, or it is not clear what is meant.
    """
    source, split = _split_suffix(source, data)
    if is_hub(source, data):
        return resolve_hub(source, split or "train", data.revision)

    source = storage.absolute(source).rstrip("/")
    found, root = _files(source)
    by_format = {
        f.name: [file for file in found if _is_of(file, f, f.suffixes)] for f in FORMATS.values() if f.suffixes
    }
    if chosen := named_format(data):
        files = by_format[chosen.name] or (found if len(found) == 1 else [])  # a single file may have any name
    else:
        chosen, files = _only_format(source, by_format)
    files = _of_split(source, root, files, split)
    if not files:
        raise SourceError(
            f"{source} holds no {chosen.name} file ({', '.join(chosen.suffixes)}); files found: {_some(found)}"
        )

    images = [file for file in found if chosen.names_images and _is_image(file.uri)]
    identity = repr([(chosen.name, *file) for file in [*files, *images]])
    digest = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
    return Source(chosen.name, tuple((file.uri, file.bytes) for file in files), root, digest, split)


def image_files(source: str) -> tuple[list[str], str]:
    """The image files behind a file, folder or glob, as paths inside a folder, and that folder.

    There are none where the source has data files, which come first; but a JSON or CSV file next to images counts as
    metadata. A single file that is no data file may have any name. Raises SourceError.
    """
    source = storage.absolute(source).rstrip("/")
    found, root = _files(source)
    names = [file.uri for file in found]
    metadata = [file for file in found if any(_is_of(file, f, f.metadata_suffixes) for f in FORMATS.values())]
    data_files = [file for file in found if any(_is_of(file, f, f.suffixes) for f in FORMATS.values())]
    if len(data_files) > len(metadata):
        return [], root

    images = [n for n in names if _is_image(n) and not n.rpartition("/")[2].startswith(".")]  # a glob lists hidden ones
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
    looks_like_id = re.fullmatch(r"\w[\w.-]*/[\w.-]+(#[\w.-]+)?", source) is not None
    return looks_like_id and not storage.exists(source.partition("#")[0])


def _split_suffix(source: str, data: DataConfig) -> tuple[str, str]:
    match = re.fullmatch(r"(.+)#([\w.-]+)", source)
    return (match[1], match[2]) if match else (source, data.split)


def _files(source: str) -> tuple[list[File], str]:
    """The files behind a path or glob, sorted, and the folder they are under."""
    patterns = _expand_braces(source)
    if patterns == [source] and not re.search(r"[*?\[]", source):
        fs, path = storage.filesystem(source)
        info = fs.get_file_info(path)
        if info.type == pafs.FileType.File:
            return [_entry(source, info)], folder_of(source)
        if info.type == pafs.FileType.NotFound:
            raise SourceError(
                f"{source} does not exist; expected a file, a folder, a glob or a hub data set id (data.format=hub)"
            )
        return [f for f in _listed(source) if not _hidden(f.uri, source)], source

    found = []
    root = folder_of(re.split(r"[*?\[{]", source, maxsplit=1)[0] + "x")
    for entry in _listed(root):
        if any(fnmatch(entry.uri, pattern) and entry.uri.count("/") == pattern.count("/") for pattern in patterns):
            found.append(entry)

    if not found:
        raise SourceError(f"no file matches {source}")
    return found, root


def _listed(folder: str) -> list[File]:
    _, path = storage.filesystem(folder)
    return [
        _entry(f"{folder}/{info.path[len(path) :].strip('/')}", info)
        for info in storage.list_files(folder, recursive=True)
    ]


def _entry(uri: str, info: pafs.FileInfo) -> File:
    return File(uri, info.size, info.mtime_ns or 0)


def _is_of(file: File, data_format: Format, suffixes: tuple[str, ...]) -> bool:
    """Whether a file has one of these endings of a format, also before that of a compression."""
    name = without_compression(file.uri) if data_format.compressible else file.uri.lower()
    return name.endswith(suffixes)


def _is_image(name: str) -> bool:
    return name.lower().rpartition(".")[2] in IMAGE_PARTS


def _hidden(uri: str, root: str) -> bool:
    return any(part.startswith((".", "_")) for part in uri[len(root) :].split("/") if part)


def _expand_braces(pattern: str) -> list[str]:
    """Expand WebDataset's range of shards, such as `x-{000..012}.tar`, to one name for each shard."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]

    low, high = match.groups()
    middle = [str(n).zfill(len(low)) for n in range(int(low), int(high) + 1)]
    return [
        expanded for m in middle for expanded in _expand_braces(pattern[: match.start()] + m + pattern[match.end() :])
    ]


def _only_format(source: str, by_format: dict[str, list[File]]) -> tuple[Format, list[File]]:
    """The one format of the files. Raises SourceError where there is none, or where several hold data."""
    there = [FORMATS[name] for name, files in by_format.items() if files]
    # A JSON or CSV file next to Parquet or tar files is common. It is metadata, not data.
    for chosen in reversed(list(there)):
        if len(there) > 1 and all(_is_of(file, chosen, chosen.metadata_suffixes) for file in by_format[chosen.name]):
            there.remove(chosen)

    if len(there) != 1:
        counts = ", ".join(f"{len(files)} {name}" for name, files in by_format.items())
        raise SourceError(f"{source} holds {counts} files; expected files of one format, or set data.format")
    return there[0], by_format[there[0].name]


def _of_split(source: str, root: str, files: list[File], split: str) -> list[File]:
    """The files of one split where their names say it (`train-00000.parquet`, `test/x.tar`), else all files."""
    named = {f: _split_of(f.uri[len(root) :]) for f in files}
    splits = sorted({name for name in named.values() if name})
    if not splits or len(files) == 1:
        return files

    if split:
        wanted = SPLIT_NAMES.get(split, split)
        if wanted not in splits:
            raise SourceError(f"{source} has no split {split!r}; splits found in its file names: {', '.join(splits)}")
        return [f for f in files if named[f] == wanted]

    if len(splits) > 1:
        raise SourceError(
            f"{source} holds several splits ({', '.join(splits)}); choose with {source}#{splits[-1]} "
            "or name the files by a glob"
        )
    return files


def _split_of(path: str) -> str:
    for part in path.split("/"):
        match = re.match(r"([a-z]+)(?=[-._]|$)", part.lower())
        if match and match[1] in SPLIT_NAMES:
            return SPLIT_NAMES[match[1]]
    return ""


def _some(found: list[File]) -> str:
    return ", ".join(f.uri.rsplit("/", 1)[-1] for f in found[:8]) + (" …" if len(found) > 8 else "") or "none"
