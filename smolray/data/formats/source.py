"""The types between a data source and its samples.

Flow: a Source (its files) is cut into ReadTasks (each is read by one worker alone), and a ReadTask is read as Raw rows.
A Format does both for one kind of file.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from smolray import storage

READ_TASK_BYTES = 256 * 2**20
SCAN_BYTES = 2**20
IMAGE_PARTS = (
    *("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "jp2", "avif", "img"),
    *("jfif", "ico", "heic", "heif"),
)
# Endings of images that are not read: such a file is told, not passed over.
UNREAD_IMAGE_PARTS = (
    *("svg", "svgz", "eps", "ai", "pdf", "psd", "jxl", "tga", "xcf", "exr", "hdr", "hif", "heics"),
    *("dng", "cr2", "cr3", "nef", "arw", "orf", "rw2", "raf", "raw"),
)


class SourceError(ValueError):
    """The source as a whole cannot be read; the message names it, what was expected and what to do."""


@dataclass(frozen=True)
class Source:
    """What a source is made of. `identity` changes when its files do."""

    format: str
    files: tuple[tuple[str, int], ...]  # (uri, bytes); of a hub data set: its name, 0 bytes
    root: str
    identity: str
    split: str = ""
    revision: str | None = None


@dataclass(frozen=True)
class ReadTask:
    """A part of the source that one worker reads alone.

    `start` to `stop` count in a unit of the format: row groups (Parquet), bytes (JSON, CSV) or shards (hub).
    """

    format: str
    uri: str
    name: str  # short and stable: rows without their own id get one that begins with it
    root: str  # image paths must stay inside it
    file: int  # place of the file in the source; the order of rows does not depend on the cut
    start: int = 0
    stop: int = 0
    first_row: int = 0
    split: str = ""
    revision: str | None = None
    variant: str = ""  # of a format with several readers, the one to use
    source: int = 0  # its number, where the data have several


@dataclass(frozen=True)
class Raw:
    """One raw row: its number in its file, and its columns, or the reason why it cannot be read."""

    row: int
    record: dict[str, Any]
    name: str = ""  # the row's own name, such as the key in a tar
    reason: str = ""
    message: str = ""


@dataclass(frozen=True)
class Format:
    """One data format.

    `cut` takes a ReadTask of a whole file, the file's bytes and the bytes wanted in a task, and yields ReadTasks. It
    raises SourceError where the file cannot be read at all. `read` yields the rows of a task one by one. A row that
    cannot be read is a Raw with a reason; the reason is "invalid_<format>" where the text is not of the format.
    """

    name: str  # the value of data.format that chooses it
    cut: Callable[[ReadTask, int, int], Iterator[ReadTask]]
    read: Callable[[ReadTask], Iterator[Raw]]
    suffixes: tuple[str, ...] = ()  # lower-case endings of its files; none: the source is not made of files
    # Those of `suffixes` that often hold metadata: such files count as data only where there is no other data.
    metadata_suffixes: tuple[str, ...] = ()
    compressible: bool = False  # its files may be compressed: `.jsonl.gz`
    names_images: bool = False  # its rows name image files, which are then a part of the source


def open_source(uri: str) -> io.BufferedReader:
    """A source file as a buffered stream of bytes, local or in object storage."""
    fs, path = storage.filesystem(uri)
    return io.BufferedReader(fs.open_input_file(path), SCAN_BYTES)


def is_wrong_layout(reason: str) -> bool:
    """Whether a row was refused because its file is of another layout or format, so that all its rows may be."""
    return reason == "wrong_columns" or reason.startswith("invalid_")
