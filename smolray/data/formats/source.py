"""The nouns between a source and its samples: Source (its files), Unit (a piece one worker reads alone), Raw (one row
as it came).
"""

import io
from dataclasses import dataclass
from typing import Any

from smolray import storage

READ_TASK_BYTES = 256 * 2**20


class SourceError(ValueError):
    """The source as a whole cannot be read; the message names it, what was expected and what to do."""


@dataclass(frozen=True)
class ReadTask:
    """A piece of the source: `start` to `stop` are row groups (parquet), bytes (jsonl, json) or a shard number of the
    hub split.
    """

    reader: str  # parquet | tar | jsonl | json | hub
    uri: str
    name: str  # short and stable: what ids of rows without one begin with
    root: str  # image paths stay inside it
    file: int  # place of the file in the source, for an order that does not depend on how units are cut
    start: int = 0
    stop: int = 0
    first_row: int = 0
    split: str = ""
    revision: str | None = None


@dataclass(frozen=True)
class Raw:
    """One raw row: its number in its file, and its columns or the reason why it cannot be read."""

    row: int
    record: dict[str, Any]
    name: str = ""  # a name of its own, such as the key in a tar
    reason: str = ""
    message: str = ""


@dataclass(frozen=True)
class Source:
    """What a source is made of. `identity` changes when its files do."""

    format: str
    files: tuple[tuple[str, int], ...]  # uri, bytes
    root: str
    identity: str
    split: str = ""
    revision: str | None = None


SCAN_BYTES = 2**20
IMAGE_PARTS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "jp2", "avif", "img")


def open_source(uri: str) -> io.BufferedReader:
    """A source file as a buffered stream of bytes, local or in object storage."""
    fs, path = storage.filesystem(uri)
    return io.BufferedReader(fs.open_input_file(path), SCAN_BYTES)
