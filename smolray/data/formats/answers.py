"""The answers in a value of a record: one, those of several annotators, captions, or a list of numbers.

In: a value and the name of its column. Out: the answers as texts, or a SampleError.
"""

import json
from collections.abc import Mapping
from typing import Any

from smolray.data.formats.values import parsed_list, shown, text_of
from smolray.data.sample import SampleError

# Where an answer or caption is a struct, the key that holds its text: VQAv2, COCO's sentences, SQuAD.
TEXT_KEYS = ("answer", "raw", "text", "caption", "sentence", "value")


def answers_of(value: Any, name: str) -> tuple[str, ...]:
    """The answers in a value: one answer, a list of them, a list of structs {answer, …}, or that as a dict of lists.

    A list of numbers, such as a box, is one answer, written as JSON, unless it is a whole number repeated by several
    annotators. Raises SampleError.
    """
    if isinstance(value, str) and name.endswith("answers") and (listed := parsed_list(value)) is not None:
        value = listed
    if isinstance(value, Mapping):
        value = _text_in(value, name)
    values = value if isinstance(value, (list, tuple)) else [value]

    if _is_numbers(values) and len(values) > 1 and not (isinstance(values[0], int) and len({*map(str, values)}) == 1):
        return (json.dumps(values),)
    texts = (_text_in(v, name) if isinstance(v, Mapping) else v for v in values)
    return tuple(text_of(text, f"a value of {name!r}") for text in texts)


def _text_in(value: Mapping[str, Any], name: str) -> Any:
    key = next((key for key in TEXT_KEYS if value.get(key) is not None), None)
    if key is None:
        raise SampleError(
            "wrong_type", f"a value of {name!r} is {shown(value)}; expected text, or a dict with its text"
        )
    return value[key]


def _is_numbers(values: Any) -> bool:
    """Whether these are numbers, or lists of numbers, and nothing else."""
    return bool(values) and all(
        _is_numbers(v) if isinstance(v, list | tuple) else isinstance(v, int | float) and not isinstance(v, bool)
        for v in values
    )
