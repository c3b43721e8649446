"""Raw data as units of work: what a source consists of, and the raw records of one unit as a stream.

In: a path, glob, URI or hub id. Out: `Unit`s (about UNIT_BYTES each, cut so that any worker can read one alone), then
`Raw` records of one.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from fnmatch import fnmatch

import pyarrow.fs as pafs

from smolray import storage
from smolray.config import DataConfig
from smolray.data.formats.hub import hub_read_tasks, read_hub, resolve_hub
from smolray.data.formats.images import folder_of
from smolray.data.formats.jsonl import cut_json, read_json, read_jsonl
from smolray.data.formats.parquet import cut_parquet, read_parquet
from smolray.data.formats.source import IMAGE_PARTS, READ_TASK_BYTES, Raw, ReadTask, Source, SourceError
from smolray.data.formats.webdataset import cut_tar, read_tar

SUFFIXES = {
    "parquet": (".parquet",),
    "webdataset": (".tar", ".tar.gz", ".tgz"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
}
READERS: dict[str, Callable[[ReadTask], Iterator[Raw]]] = {
    "parquet": read_parquet,
    "tar": read_tar,
    "jsonl": read_jsonl,
    "json": read_json,
}
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}
SPLIT_NAMES |= {"test": "test", "testing": "test", "eval": "test"}


def resolve(source: str, data: DataConfig) -> Source:
    """Find the files behind `source`: a file, a folder, a glob (`data/train-*.parquet`, `{000..009}.tar`) or a hub data
    set id.

    `#split` behind the source, else `data.split`, chooses a split. Raises SourceError.
    """
    source, split = _split_suffix(source, data)
    if is_hub(source, data):
        return resolve_hub(source, split or "train", data.revision)
    source = storage.absolute(source).rstrip("/")
    found, root = _files(source)
    by_format = {name: [f for f in found if f[0].lower().endswith(ends)] for name, ends in SUFFIXES.items()}
    if data.format != "auto":
        chosen: str = data.format
        files = by_format[chosen] or (found if len(found) == 1 else [])  # a single file may bear any name
    else:
        chosen, files = _only_format(source, by_format)
    files = _of_split(source, root, files, split)
    if not files:
        raise SourceError(
            f"{source} holds no {chosen} file ({', '.join(SUFFIXES[chosen])}); files found: {_some(found)}"
        )
    # of a folder: JSON lines name files beside them
    named = [f for f in found if chosen == "jsonl" and _is_image(f[0])]
    identity = hashlib.blake2b(repr([(chosen, *f) for f in [*files, *named]]).encode(), digest_size=16).hexdigest()
    return Source(chosen, tuple((f[0], f[1]) for f in files), root, identity, split)


def image_files(source: str) -> tuple[list[str], str]:
    """Image files behind a file, folder or glob, as paths inside the folder that comes with them; none where data files
    are what is meant.

    Data files go before images, but for a JSON beside images; a single file that is no data file may bear any name.
    Raises SourceError.
    """
    source = storage.absolute(source).rstrip("/")
    found, root = _files(source)
    names = [uri for uri, *_ in found]
    if any(
        name.lower().endswith(ends) for name in names for kind in SUFFIXES.values() for ends in kind if ends != ".json"
    ):
        return [], root
    images = [n for n in names if _is_image(n) and not n.rpartition("/")[2].startswith(".")]  # a glob lists hidden ones
    if len(names) == 1 and not names[0].lower().endswith(".json"):
        images = names
    if not images and not names:
        raise SourceError(f"{source} holds no file")
    return [name[len(root) :].strip("/") for name in images], root


def list_read_tasks(source: Source, task_bytes: int = READ_TASK_BYTES) -> list[ReadTask]:
    """Cut a source into read tasks.

    Reads Parquet footers, and JSON files once from end to end for their line numbers; no image is read.
    """
    return list(iter_read_tasks(source, task_bytes))


def iter_read_tasks(source: Source, task_bytes: int = READ_TASK_BYTES) -> Iterator[ReadTask]:
    """The same read tasks one after another: the first is there before the rest of the source has been looked at."""
    if source.format == "hub":
        yield from hub_read_tasks(source)
        return

    cut: Callable[[ReadTask, int, int], Iterator[ReadTask]]
    cut = {"parquet": cut_parquet, "webdataset": cut_tar, "jsonl": cut_json}[source.format]
    for number, (uri, size) in enumerate(source.files):
        whole = ReadTask(source.format, uri, uri[len(source.root) :].strip("/"), source.root, number)
        yield from cut(whole, size, task_bytes)


def read_rows(task: ReadTask) -> Iterator[Raw]:
    """Stream the raw rows of a unit; a row that cannot be read comes as a Raw with a reason.

    Memory does not grow with the unit.
    """
    if task.reader == "hub":
        return read_hub(task)
    return READERS[task.reader](task)


def read_tasks_fingerprint(tasks: list[ReadTask]) -> str:
    return hashlib.blake2b(repr([asdict(u) for u in tasks]).encode(), digest_size=8).hexdigest()


def is_hub(source: str, data: DataConfig) -> bool:
    """Whether `source` is a hub data set id: said by data.format, or `owner/name` where no such file is."""
    if data.format != "auto":
        return data.format == "hub"
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+(#[\w.-]+)?", source) is not None and not storage.exists(
        source.partition("#")[0]
    )


def _split_suffix(source: str, data: DataConfig) -> tuple[str, str]:
    match = re.fullmatch(r"(.+)#([\w.-]+)", source)
    return (match[1], match[2]) if match else (source, data.split)


def _files(source: str) -> tuple[list[tuple[str, int, int]], str]:
    """(uri, bytes, time of change) of the files behind a path or glob, sorted, and the folder they lie under."""
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
        return [f for f in _listed(source) if not _hidden(f[0], source)], source
    found = []
    root = folder_of(re.split(r"[*?\[{]", source, maxsplit=1)[0] + "x")
    for entry in _listed(root):
        if any(fnmatch(entry[0], pattern) and entry[0].count("/") == pattern.count("/") for pattern in patterns):
            found.append(entry)
    if not found:
        raise SourceError(f"no file matches {source}")
    return found, root


def _listed(folder: str) -> list[tuple[str, int, int]]:
    _, path = storage.filesystem(folder)
    return [
        _entry(f"{folder}/{info.path[len(path) :].strip('/')}", info)
        for info in storage.list_files(folder, recursive=True)
    ]


def _entry(uri: str, info: pafs.FileInfo) -> tuple[str, int, int]:
    return uri, info.size, info.mtime_ns or 0


def _is_image(name: str) -> bool:
    return name.lower().rpartition(".")[2] in IMAGE_PARTS


def _hidden(uri: str, root: str) -> bool:
    return any(part.startswith((".", "_")) for part in uri[len(root) :].split("/") if part)


def _expand_braces(pattern: str) -> list[str]:
    """`x-{000..012}.tar`, the way WebDataset writes a range of shards, as one name each."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    low, high = match.groups()
    middle = [str(n).zfill(len(low)) for n in range(int(low), int(high) + 1)]
    return [
        expanded for m in middle for expanded in _expand_braces(pattern[: match.start()] + m + pattern[match.end() :])
    ]


def _only_format(
    source: str, by_format: dict[str, list[tuple[str, int, int]]]
) -> tuple[str, list[tuple[str, int, int]]]:
    there = {name: files for name, files in by_format.items() if files}
    if len(there) > 1:
        # A stray JSON of metadata beside Parquet or tar files is common and is not data.
        there = {
            name: files for name, files in there.items() if not all(f[0].endswith(".json") for f in files)
        } or there
    if len(there) != 1:
        counts = ", ".join(f"{len(files)} {name}" for name, files in by_format.items())
        raise SourceError(f"{source} holds {counts} files; expected files of one format, or set data.format")
    return next(iter(there.items()))


def _of_split(source: str, root: str, files: list[tuple[str, int, int]], split: str) -> list[tuple[str, int, int]]:
    """The files of one split where the names say it (`train-00000.parquet`, `test/x.tar`); all of them where they do
    not.
    """
    named = {f: _split_of(f[0][len(root) :]) for f in files}
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
            f"{source} holds several splits ({', '.join(splits)}); choose with {source}#{splits[-1]} or name the files by a glob"
        )
    return files


def _split_of(path: str) -> str:
    for part in path.split("/"):
        match = re.match(r"([a-z]+)(?=[-._]|$)", part.lower())
        if match and match[1] in SPLIT_NAMES:
            return SPLIT_NAMES[match[1]]
    return ""


def _some(found: list[tuple[str, int, int]]) -> str:
    return ", ".join(f[0].rsplit("/", 1)[-1] for f in found[:8]) + (" …" if len(found) > 8 else "") or "none"
