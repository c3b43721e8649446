"""The files behind a path, a glob or a URI.

In: what the person typed. Out: its files, sorted, and the folder that they are under. What exists is taken as it is, so
a folder may be called `set#2` or `photos [old]`.
"""

import os
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from typing import NamedTuple

import pyarrow.fs as pafs

from smolray import storage
from smolray.data.formats.images import folder_of
from smolray.data.formats.source import IMAGE_PARTS, SourceError

_WILD = re.compile(r"[*?\[{]")


class File(NamedTuple):
    """A file of a source, as it is listed."""

    uri: str
    bytes: int
    changed: int  # time of the last change in ns, 0 where it is not known


def list_source(source: str) -> tuple[list[File], str]:
    """The files behind an absolute path or glob, sorted, and the folder they are under.

    Hidden files (`.` or `_` first) count only where a glob names them. Raises SourceError: there is nothing, a link
    leads nowhere, a folder cannot be read.
    """
    fs, path = storage.filesystem(source)
    info = fs.get_file_info(path) if is_text(source) else None
    if info is not None and info.type == pafs.FileType.File:
        return [File(source, info.size, info.mtime_ns or 0)], folder_of(source)
    if info is not None and info.type != pafs.FileType.NotFound:
        return [f for f in _below(source) if not _hidden(f.uri, source)], source
    if not _WILD.search(source):
        raise SourceError(
            f"{shown(source)} does not exist; expected a file, a folder, a glob or a hub data set id (data.format=hub)"
        )

    folder, pattern = _split_glob(source)
    patterns = _expand_braces(pattern)
    depths = {p.count("/") for p in patterns}
    found = []
    for file in _below(folder):
        name = file.uri[len(folder) :].lstrip("/")
        if name.count("/") in depths and any(fnmatch(name, p) and name.count("/") == p.count("/") for p in patterns):
            found.append(file)
    if not found:
        raise SourceError(f"no file matches {source}")
    return found, folder


def once(files: list[File]) -> list[File]:
    """The files without those that are links to another of them."""
    real = {f: os.path.realpath(f.uri) if storage.is_local(f.uri) else f.uri for f in files}
    first: dict[str, File] = {}
    for file in sorted(files, key=lambda f: (real[f] != f.uri, f.uri)):
        first.setdefault(real[file], file)
    kept = set(first.values())
    return [f for f in files if f in kept]


def shown(uri: str) -> str:
    """A URI for a message, whatever bytes its name has."""
    return uri.encode(errors="surrogateescape").decode(errors="backslashreplace")


def is_image(name: str) -> bool:
    """Whether a name has the ending of an image that is read."""
    return name.lower().rpartition(".")[2] in IMAGE_PARTS


def is_text(uri: str) -> bool:
    """Whether a name is Unicode; others reach neither pyarrow nor a message."""
    try:
        uri.encode()
    except UnicodeEncodeError:
        return False
    return True


def _split_glob(source: str) -> tuple[str, str]:
    """The deepest folder above the first wildcard, and the pattern below it. Parts that exist are no wildcards."""
    scheme, slashes, path = source.rpartition("://")
    parts = path.split("/")
    for n in range(1, len(parts)):
        if _WILD.search(parts[n]) and not storage.exists(scheme + slashes + "/".join(parts[: n + 1])):
            return scheme + slashes + ("/".join(parts[:n]) or "/"), "/".join(parts[n:])
    return folder_of(source), parts[-1]


def _below(folder: str) -> list[File]:
    """All files below a folder, sorted."""
    if storage.is_local(folder):
        return sorted(_walk(folder, ()))
    _, path = storage.filesystem(folder)
    listed = storage.list_files(folder, recursive=True)
    return [File(f"{folder}/{i.path[len(path) :].strip('/')}", i.size, i.mtime_ns or 0) for i in listed]


def _walk(folder: str, above: tuple[str, ...]) -> Iterator[File]:
    """The files of a local folder. A link to a folder above is not followed: it would be read again and again."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise SourceError(f"{shown(folder)} cannot be listed: {error.strerror}") from error

    for entry in entries:
        path = os.path.join(folder, entry.name)
        try:
            if entry.is_dir():
                yield from _walk(path, (*above, real))
            elif entry.is_file():
                status = entry.stat()
                yield File(path, status.st_size, status.st_mtime_ns)
            elif entry.is_symlink() and is_image(entry.name):  # the rows that name it are told
                yield File(path, 0, 0)
            elif entry.is_symlink() and not entry.name.startswith((".", "_")) and not os.path.exists(path):
                target = shown(os.readlink(path))
                raise SourceError(f"{shown(path)} is a link to {target}, which does not exist; mend or remove it")
        except OSError as error:
            raise SourceError(f"{shown(path)} cannot be read: {error.strerror}") from error


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
