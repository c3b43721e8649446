"""Arrow record batches (of Parquet and Arrow files) -> raw rows.

In: a batch, the number of its first row, and the names of class labels. Out: a Raw for each row. Values that Python
cannot hold, such as a time in nanoseconds, are text.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from smolray.data.formats.source import Raw

_INDEX_COLUMN = re.compile(r"__index_level_\d+__")  # pandas writes its index as a column


def batch_rows(batch: pa.RecordBatch, first: int, labels: Mapping[str, Sequence[str]]) -> Iterator[Raw]:
    """The rows of a batch, numbered from `first`, with class labels as names."""
    kept = [n for n, name in enumerate(batch.schema.names) if not _INDEX_COLUMN.fullmatch(name)]
    names = [batch.schema.names[n] for n in kept]
    values = [_values(_without_times(batch.column(n))) for n in kept]

    for number in range(batch.num_rows):
        record, fault = {}, ("", "")
        for name, of_column in zip(names, values, strict=True):
            value = of_column[number]
            if isinstance(value, Unreadable):
                fault = (value.reason, f"column {name!r}: {value.message}")
            elif name in labels and isinstance(value, int):
                value, fault = class_label(name, value, labels[name], fault)
            record[name] = value
        if fault[0]:
            yield Raw(first + number, {}, "", *fault)
        else:
            yield Raw(first + number, record)


class Unreadable:
    """Stands for a value that cannot be read: the reason for the quarantine, and what is wrong."""

    def __init__(self, reason: str, message: str):
        self.reason, self.message = reason, message


def _values(column: pa.Array) -> list[Any]:
    try:
        return column.to_pylist()
    except (ValueError, OverflowError, TypeError, pa.ArrowException):  # one bad value makes it fail for all rows
        return [_value(column[number]) for number in range(len(column))]


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return Unreadable("bad_text", f"a text is not UTF-8: {error.reason} at byte {error.start}")
    except (ValueError, OverflowError, TypeError, pa.ArrowException) as error:
        return Unreadable("wrong_type", f"a value of type {scalar.type} cannot be read: {str(error)[:200]}")


def _without_times(column: pa.Array) -> pa.Array:
    """A column of times, dates or durations as text; other columns as they are."""
    if not pa.types.is_temporal(column.type) or pa.types.is_interval(column.type):
        return column
    try:
        return pc.cast(column, pa.string())
    except pa.ArrowException:  # an unknown time zone
        return pc.cast(pc.cast(column, pa.int64()), pa.string())


def class_label(name: str, value: int, names: Sequence[str], fault: tuple[str, str]) -> tuple[Any, tuple[str, str]]:
    """The name of a class label; -1 is no label, as in `datasets`. `fault`: the row's so far, or that of this label."""
    if value == -1:
        return None, fault
    if 0 <= value < len(names):
        return names[value], fault
    return value, ("wrong_type", f"column {name!r}: label {value} is none of its {len(names)} class labels")


def label_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Names of the Hugging Face ClassLabel columns, which are stored as numbers."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}  # without the metadata labels stay numbers
    if not isinstance(features, dict):
        return {}
    labels = {n: f.get("names") for n, f in features.items() if isinstance(f, dict) and f.get("_type") == "ClassLabel"}
    return {name: _in_order(names) for name, names in labels.items() if _in_order(names)}


def _in_order(names: Any) -> list[str]:
    """The names of a ClassLabel, which are a list, or a dict from their numbers."""
    if isinstance(names, dict) and all(str(key).isdigit() for key in names):
        names = [names.get(str(n), names.get(n)) for n in range(len(names))]
    return names if isinstance(names, list) and all(isinstance(n, str) for n in names) else []
