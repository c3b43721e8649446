"""What the columns of a raw record hold: images, a question, answers, an id, a type.

In: a record as its file had it. Out: checked values, or a SampleError that names the column and what was expected.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from smolray.config import DataConfig
from smolray.data.sample import SampleError

RawRecord = Mapping[str, Any]

IMAGE_COLUMNS = ("images", "image", "jpg", "jpeg", "png", "webp", "img")
QUESTION_COLUMNS = ("question", "query")
ANSWER_COLUMNS = ("multiple_choice_answer", "answer", "answers", "label")
CAPTION_COLUMNS = ("captions", "caption", "text", "txt")
LABEL_COLUMNS = ("label", "cls")
ID_COLUMNS = ("question_id", "questionId", "id")
TYPE_COLUMNS = ("answer_type", "question_type", "question_types", "type")


def check_named_columns(record: RawRecord, data: DataConfig, keys: Collection[str] | None = None) -> None:
    """Raise SampleError where a column that data.columns names is missing. `keys`: the ones to check; default: all."""
    named = data.columns.model_dump(include=None if keys is None else set(keys))
    for key, column in named.items():
        if column and column not in record:
            message = f"column {column!r} (data.columns.{key}) is not there; {columns_found(record)}"
            raise SampleError("wrong_columns", message)


def columns_found(record: RawRecord) -> str:
    """The columns of a record, for a message."""
    names = (str(name) if value is not None else f"{name} (empty)" for name, value in record.items())
    return f"columns found: {', '.join(names) or 'none'}"


def filled_columns(record: RawRecord) -> set[str]:
    """Names of the columns that hold a value."""
    return {name for name, value in record.items() if value is not None}


def has_image(record: RawRecord, data: DataConfig) -> bool:
    """Whether an image column holds anything."""
    return bool(_image_columns(record, data))


def image_values(record: RawRecord, data: DataConfig, embedded: list[Any]) -> list[Any]:
    """Image values in order: those inside the messages, else those of the first image column that holds any."""
    columns = _image_columns(record, data)
    if embedded and columns:
        raise SampleError(
            "image_count", f"images both inside the messages and in column {columns[0]!r}: it is not clear which to use"
        )

    if not columns:
        return embedded

    value = record[columns[0]]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _image_columns(record: RawRecord, data: DataConfig) -> list[str]:
    columns = [data.columns.image] if data.columns.image else [c for c in IMAGE_COLUMNS if c in record]
    return [c for c in columns if record[c] is not None and record[c] != []]


def answers_of(value: Any, name: str) -> tuple[str, ...]:
    """The answers in a value: one answer, a list of them, VQAv2's list of {answer, …}, or that as a dict of lists."""
    if isinstance(value, Mapping) and "answer" in value:
        value = value["answer"]
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(text_of(v.get("answer") if isinstance(v, Mapping) else v, f"a value of {name!r}") for v in values)


def question_of(record: RawRecord, data: DataConfig) -> Any:
    """The value of the question column, None where there is none."""
    if data.columns.question:
        return record[data.columns.question]
    return next((record[c] for c in QUESTION_COLUMNS if record.get(c) is not None), None)


def own_id(record: RawRecord, data: DataConfig) -> str:
    """The row's own id, empty where it has none. Raises SampleError where data.columns.id holds none."""
    for column in [data.columns.id] if data.columns.id else ID_COLUMNS:
        value = record.get(column)
        if isinstance(value, (str, int)) and not isinstance(value, bool):
            return str(value)
        if data.columns.id:
            raise SampleError(
                "wrong_type", f"the id in column {column!r} is {shown(value)}; expected a string or an integer"
            )
    return ""


def type_of(record: RawRecord, data: DataConfig) -> str:
    """The type of the question, for tables by type; empty where the record names none."""
    for column in [data.columns.type] if data.columns.type else TYPE_COLUMNS:
        value = record.get(column)
        if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
            return ", ".join(value)
        if isinstance(value, (str, int)):
            return str(value)
    return ""


def text_of(value: Any, name: str) -> str:
    """A text, number or boolean as text. Raises SampleError for any other value."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    if not isinstance(value, str):
        raise SampleError("wrong_type", f"{name} is {shown(value)}; expected text")
    return value


def list_of(value: Any, name: str) -> Sequence[Any]:
    """The value itself if it is a list. Raises SampleError."""
    if not isinstance(value, (list, tuple)):
        raise SampleError("wrong_type", f"{name} is {shown(value)}; expected a list")
    return value


def shown(value: Any) -> str:
    """The beginning of a value and its type, for a message."""
    return f"{repr(value)[:80]} ({type(value).__name__})"
