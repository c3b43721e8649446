"""Columns that matter and stand unused: images, options, a system prompt or context that training would not see.

In: a record and what its columns were used as. Out: the columns that stand unused, with what they look like and the
setting that uses them or leaves them out on purpose.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from smolray.config import DataConfig
from smolray.data.formats.columns import RawRecord
from smolray.data.formats.image_columns import IMAGE_COLUMNS, image_kind
from smolray.data.formats.options import OPTION_COLUMNS, option_columns
from smolray.data.formats.question import CONTEXT_COLUMNS, HISTORY_COLUMNS, SYSTEM_COLUMNS
from smolray.data.formats.values import is_empty, is_nan_text, parsed_list
from smolray.data.sample import Sample

GOOD_COLUMNS = ("label", "kto_tag")  # KTO: answers that are good or bad, without pairs
IMAGE_NAME = re.compile(r"(?:image|img|picture|photo|pic|screenshot)s?(?:[_\d-].*|id)?|file_?names?", re.IGNORECASE)
_VIDEO_NAME = re.compile(r"(?:video|audio)s?(?:_(?:path|file|url)s?)?", re.IGNORECASE)
_VIDEO_ENDING = re.compile(r"[^\n]{1,1024}\.(?:mp4|webm|avi|mov|mkv|m4v|mpe?g|wav|mp3|flac)(?:[?#]\S*)?", re.IGNORECASE)


@dataclass(frozen=True)
class ParsedRow:
    """The samples of one record, and what each of its columns was `used` as: "image", "question", "answer"."""

    samples: list[Sample]
    used: dict[str, str]


@dataclass(frozen=True)
class UnusedColumn:
    """A column that matters and was not used. `looks_like`: why it matters, for a message; `setting`: what uses it."""

    column: str
    kind: str  # image | video | options | system | context | history | label | tools
    looks_like: str
    setting: str = ""

    def __str__(self) -> str:
        remedy = f"use it with {self.setting}={self.column}, or leave it" if self.setting else "leave it"
        return (
            f"column {self.column!r} is not used, and {self.looks_like}: {remedy} out with "
            f"data.ignore_columns=[{self.column}]"
        )


def unused_columns(record: RawRecord, parsed: ParsedRow, data: DataConfig) -> list[UnusedColumn]:
    """The columns of a record that matter and were not used; none that data.ignore_columns names."""
    found = []
    for column, value in record.items():
        if column in parsed.used or column in data.ignore_columns or is_empty(value):
            continue
        if value is False and column.lower() not in GOOD_COLUMNS:
            continue
        if unused := _image(column, value, record, parsed) or _text(column, value, record, parsed):
            found.append(unused)
    return found


def unused_message(where: str, unused: Sequence[UnusedColumn]) -> str:
    """One message about the unused columns of the rows at `where`."""
    return f"{where}: " + "\n".join(map(str, unused))


def _image(column: str, value: Any, record: RawRecord, parsed: ParsedRow) -> UnusedColumn | None:
    """An image, or what names one where the row has none. A path or URL of an image that was used is none."""
    if _VIDEO_NAME.fullmatch(column) or (isinstance(value, str) and _VIDEO_ENDING.fullmatch(value)):
        return UnusedColumn(column, "video", "holds video or audio, which is not supported")

    kind, images = image_kind(value), parsed.samples[0].images if parsed.samples else ()
    if kind in ("image bytes", "a data URI"):
        known = all(inner in images for inner in _bytes_of(value)) and kind == "image bytes"
        return None if known else UnusedColumn(column, "image", f"holds {kind}", "data.columns.image")
    if kind and not images:
        return UnusedColumn(column, "image", f"holds {kind}", "data.columns.image")
    if kind == "a path of an image":
        stems = {s for c, use in parsed.used.items() if use == "image" for s in _stems(record.get(c))}
        if stems and not stems & set(_stems(value)):
            return UnusedColumn(column, "image", f"holds {kind}", "data.columns.image")
        return None

    sentence = isinstance(value, str) and len(value.split()) > 1
    if not images and not sentence and IMAGE_NAME.fullmatch(column) and _has_no_image_column(record):
        return UnusedColumn(column, "image", "is named like an image column", "data.columns.image")
    return None


def _has_no_image_column(record: RawRecord) -> bool:
    return not {str(name).lower() for name in record} & set(IMAGE_COLUMNS[:13])


def _bytes_of(value: Any) -> list[bytes]:
    """The bytes inside an image value or a list of them."""
    if isinstance(value, list | tuple):
        return [inner for v in value for inner in _bytes_of(v)]
    if isinstance(value, Mapping):
        return _bytes_of(value.get("bytes"))
    return [bytes(value)] if isinstance(value, bytes | bytearray | memoryview) else []


def _stems(value: Any) -> list[str]:
    """The file names, without ending, of the paths in an image value or a list of them."""
    if isinstance(value, list | tuple):
        return [stem for v in value for stem in _stems(v)]
    if isinstance(value, Mapping):
        return _stems(value.get("path")) if value.get("bytes") is None else []
    if isinstance(value, str) and value[:5].lower() != "data:":
        return [PurePosixPath(value.replace("\\", "/")).stem]
    return []


def _text(column: str, value: Any, record: RawRecord, parsed: ParsedRow) -> UnusedColumn | None:
    """Options, a system prompt or context."""
    name, asks = column.lower(), "question" in parsed.used.values()
    if is_nan_text(value) or (isinstance(value, str) and parsed_list(value) == []):
        return None
    if name in OPTION_COLUMNS or column in option_columns(record):
        return UnusedColumn(column, "options", "looks like the options of the question")
    if name in SYSTEM_COLUMNS:
        return UnusedColumn(column, "system", "looks like a system prompt")
    if name in CONTEXT_COLUMNS:
        return UnusedColumn(column, "context", "looks like context", "data.columns.context" if asks else "")
    if name in HISTORY_COLUMNS:
        return UnusedColumn(column, "history", "looks like earlier turns")
    if name in GOOD_COLUMNS and isinstance(value, bool):
        return UnusedColumn(column, "label", "says whether the answer is good, which is not supported")
    if name == "tools":
        return UnusedColumn(column, "tools", "looks like tools, which are not supported")
    return None
