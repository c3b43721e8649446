"""Single values of a raw record -> text, lists and messages about them.

In: a value as its file had it. Out: a checked value, or a SampleError that names it and what was expected.
"""

import ast
import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import date
from decimal import Decimal
from typing import Any

from smolray.data.sample import SampleError

MAX_LITERAL = 2**16  # characters; deeper text would only be a strain on the parser
SHOWN = 80  # characters of a value in a message


def text_of(value: Any, name: str) -> str:
    """A text, number, date or boolean as text; whole numbers that became floats are whole again (1, not 1.0).

    Raises SampleError for any other value.
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, int | Decimal | date) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    if not isinstance(value, str):
        raise SampleError("wrong_type", f"{name} is {shown(value)}; expected text")
    return value


def list_of(value: Any, name: str) -> Sequence[Any]:
    """The value as a list: a list, the text of a JSON list, or a dict of lists (as `datasets` stores lists of dicts).

    Raises SampleError.
    """
    if isinstance(value, str) and (parsed := parsed_list(value)) is not None:
        return parsed
    lists = list(value.values()) if isinstance(value, Mapping) else []
    if lists and all(isinstance(v, list | tuple) for v in lists) and len({*map(len, lists)}) == 1:
        return [dict(zip(value, row, strict=True)) for row in zip(*lists, strict=True)]
    if not isinstance(value, (list, tuple)):
        raise SampleError("wrong_type", f"{name} is {shown(value)}; expected a list")
    return value


def parsed_list(text: str) -> list[Any] | None:
    """The list that a text is in JSON or as Python prints it; None where it is none."""
    text = text.strip()
    if not text.startswith("[") or not text.endswith("]"):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = _printed(text)
    return value if isinstance(value, list) else None


def _printed(text: str) -> Any:
    """The value of a Python literal; numpy prints arrays of texts without commas."""
    if len(text) > MAX_LITERAL:
        return None
    try:
        return ast.literal_eval(re.sub(r"(?<=['\"])\s+(?=['\"])", ", ", text))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def is_missing(value: Any) -> bool:
    """Whether a value is null: None, or the NaN that pandas writes for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, blank text, an empty list, a list of such values."""
    if isinstance(value, list | tuple):
        return all(map(is_empty, value))
    return is_missing(value) or (isinstance(value, str) and not value.strip())


def is_nan_text(value: Any) -> bool:
    """Whether a value is the text `nan`, which pandas leaves in place of a null."""
    return isinstance(value, str) and value.strip().lower() == "nan"


def shown(value: Any) -> str:
    """The beginning of a value and its type, for a message. Bytes and long words, such as base64, are cut short."""
    return f"{repr(_short(value))[:SHOWN]} ({type(value).__name__})"


class _Size(str):
    """A text that shows itself without quotes."""

    def __repr__(self) -> str:
        return str(self)


def _short(value: Any) -> Any:
    if isinstance(value, bytes | bytearray | memoryview):
        return _Size(f"<{len(value)} bytes>")
    if isinstance(value, str):
        if value[:5].lower() == "data:":
            return _Size(f"'{value[:22]}…' <{len(value)} characters>")
        words = value[:SHOWN].split()
        return _Size(f"{value[:24]!r}… <{len(value)} characters>") if len(words) == 1 and len(value) > SHOWN else value
    if isinstance(value, Mapping):
        return {k: _short(v) for k, v in list(value.items())[:8]}
    if isinstance(value, list | tuple):
        return [_short(v) for v in value[:8]]
    return value
