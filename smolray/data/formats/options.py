"""Multiple choice: options in the question as `A. …` lines, and the answer as the option that it stands for.

In: a Row. Out: its options, and the text of an answer in the form of data.option_answer.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from smolray.data.formats.columns import ANSWER_COLUMNS, Row
from smolray.data.formats.values import is_empty, is_missing, is_nan_text, list_of, parsed_list, shown, text_of
from smolray.data.sample import SampleError

OPTION_COLUMNS = (
    *("options", "choices", "candidates", "answer_choices", "answer_options", "multiple_choices", "mc_options"),
    *("option_list", "choice_list", "answer_candidates"),
)
# Columns with the number or the letter of the right option, beside those of answers.
KEY_COLUMNS = (
    *("correct_choice_idx", "correct_idx", "correct_index", "correct_option_idx", "answer_idx", "answer_index"),
    *("answer_label", "answerKey", "answer_key", "correct_choice", "correct_option", "correct_answer", "gt_index"),
)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_OPTION_NAME = re.compile(r"(?:options?|choices?)?[ _-]?([a-j]|\d)", re.IGNORECASE)
_LABEL = re.compile(r"(?:^|(?<=[\s,;]))\(?([A-Za-z])\s?[).:]\s*")
_LETTER = re.compile(r"\(?([A-Za-z])[).:]?")


def take_options(row: Row) -> tuple[str, ...]:
    """The options of the row's question, whose columns are then used; empty where it has none.

    They are a list, a list as text (JSON, Python, `A. … B. …`), a dict of letters, or columns such as `A` and `B` or
    `option_1` and `option_2`.
    """
    named = row.data.columns.options
    columns = [row.find((name,)) for name in ((named,) if named else OPTION_COLUMNS)]
    for column in columns:
        if column and not is_empty(row.record[column]):
            row.use(column, "options")
            return _options(row.record[column], column)

    lettered = option_columns(row.record)
    filled = [c for c in lettered if not is_empty(row.record[c]) and not is_nan_text(row.record[c])]
    if filled != lettered[: len(filled)]:
        raise SampleError("wrong_type", f"option {filled[-1]!r} stands behind an empty one")
    return tuple(text_of(row.use(c, "options"), f"the option {c!r}").strip() for c in filled)


def option_columns(record: Mapping[str, Any]) -> list[str]:
    """Columns with an option each, in order: `A`, `B` …, `option_a` … or `choice1` …; empty where there are no two."""
    found: dict[tuple[str, bool], list[tuple[str, str]]] = {}
    for column in record:
        if (match := _OPTION_NAME.fullmatch(str(column))) and not column.isdigit():
            kind = (column[: match.start(1)].lower(), match[1].isdigit())
            found.setdefault(kind, []).append((match[1].lower(), column))
    for columns in map(sorted, found.values()):
        if len(columns) > 1 and columns[0][0] in "a01":
            return [column for _, column in columns]
    return []


def _options(value: Any, column: str) -> tuple[str, ...]:
    if isinstance(value, str):
        listed = parsed_list(value)
        value = _split(value, column) if listed is None else listed
    if isinstance(value, Mapping):
        texts = next((value[key] for key in ("text", "choices", "options") if isinstance(value.get(key), list)), None)
        value = texts or [value[key] for key in sorted(value) if not is_empty(value[key])]

    texts = [_text_of_option(v, column) for v in list_of(value, f"{column!r}")]
    bare = [_LABEL.sub("", text, count=1) for text in texts]
    labels = [m[1].upper() if (m := _LABEL.match(text)) else "" for text in texts]
    options = tuple(bare if labels == list(LETTERS[: len(labels)]) else texts)
    if len(options) > len(LETTERS):
        raise SampleError(
            "wrong_answer", f"{column!r} holds {len(options)} options; at most {len(LETTERS)} have a letter"
        )
    return options


def _text_of_option(value: Any, column: str) -> str:
    if isinstance(value, Mapping):
        value = next((value[k] for k in ("text", "value", "option", "content") if not is_missing(value.get(k))), value)
    return text_of(value, f"an option of {column!r}").strip()


def _split(text: str, column: str) -> list[str]:
    """The options of one text: `A. cat B. dog`, or one a line."""
    labels = list(_LABEL.finditer(text))
    kept = [m for n, m in enumerate(labels) if m[1].upper() == LETTERS[n : n + 1]]
    if len(kept) > 1 and len(kept) == len(labels):
        ends = [m.start() for m in kept[1:]] + [len(text)]
        return [text[m.end() : end].strip().strip(",;").strip() for m, end in zip(kept, ends, strict=True)]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) < 2:
        raise SampleError("wrong_type", f"{column!r} is {shown(text)}; expected a list of options")
    return lines


def with_options(question: str, options: Sequence[str]) -> str:
    """The question with a line for each option, unless it holds them already."""
    lettered = list(zip(LETTERS, options, strict=False))
    if options and all(re.search(rf"\(?{a}[).:]\)?\s*{re.escape(text)}", question) for a, text in lettered):
        return question
    return "\n".join([question, *(f"{letter}. {text}" for letter, text in lettered)])


def key_column(row: Row) -> str:
    """The column that says which option is right; empty where none does."""
    if row.data.columns.answer:
        return row.data.columns.answer
    return row.find(("answer", *KEY_COLUMNS, "multiple_choice_answer", "label", *ANSWER_COLUMNS))


def chosen_option(value: Any, options: Sequence[str], row: Row) -> str:
    """The right option in the form of data.option_answer: its letter, its text, or both.

    `value` is its number from 0, its letter or its text, or a list of them. Raises SampleError (wrong_answer,
    empty_answer) where it is none of these, or two of them.
    """
    if isinstance(value, str) and (listed := parsed_list(value)) is not None and value not in options:
        value = listed
    if is_empty(value):
        raise SampleError("empty_answer", "the answer is empty")
    if isinstance(value, list | tuple):
        each = [place for v in value for place in _places(v, options, row.data.answer_key)]
        places = list(dict.fromkeys(each))
    else:
        places = _places(value, options, row.data.answer_key)

    form = row.data.option_answer
    letters, texts = [LETTERS[n] for n in places], [options[n] for n in places]
    if form == "letter_text":
        return "\n".join(f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True))
    return ", ".join(letters if form == "letter" else texts)


def _places(value: Any, options: Sequence[str], key: str) -> list[int]:
    """Which options a value stands for: one, or those of several letters such as `AC`."""
    text = text_of(value, "the answer").strip()
    by = _readings(text, options, key == "index_from_1")
    if key != "auto":
        found = by["index" if key.startswith("index") else key]
    elif isinstance(value, int | float):
        found = by["index"] or by["text"]
    else:
        coded = by["letter"] or by["index"]
        if by["text"] and text.islower():  # `a` is a letter only where it is no option
            coded = by["index"]
        found = by["text"] or coded
        if by["text"] and coded and not {*by["text"]} & {*coded}:
            a, b = (LETTERS[places[0]] for places in (by["text"], coded))
            what = "letter" if by["letter"] else "number"
            raise SampleError(
                "wrong_answer",
                f"the answer {text!r} is the text of option {a} and the {what} of option {b}; say which it is with "
                "data.answer_key",
            )

    if not found and key in ("auto", "letter"):
        return _several(text, options) or _none(value, options)
    return found[:1] or _none(value, options)


def _readings(text: str, options: Sequence[str], from_1: bool) -> dict[str, list[int]]:
    """The options that an answer names by its text, as a letter and as a number."""
    number = int(text) - from_1 if re.fullmatch(r"\d{1,2}", text) else -1
    letter = LETTERS.index(match[1].upper()) if (match := _LETTER.fullmatch(text)) else -1
    same = [n for n, option in enumerate(options) if option in (text, _LABEL.sub("", text, count=1).strip())]
    return {
        "text": same or [n for n, option in enumerate(options) if _plain(option) == _plain(text)],
        "letter": [letter] if 0 <= letter < len(options) else [],
        "index": [number] if 0 <= number < len(options) else [],
    }


def _several(text: str, options: Sequence[str]) -> list[int]:
    """The options of several letters, such as `AC` or `A, C`; empty where the text is something else."""
    if not re.fullmatch(r"[A-Z](?:\s*[,;/&]?\s*[A-Z])+", text):
        return []
    places = [LETTERS.index(a) for a in text if a.isalpha()]
    return places if max(places) < len(options) and len({*places}) == len(places) else []


def _none(value: Any, options: Sequence[str]) -> list[int]:
    listed = ", ".join(f"{a}. {option}" for a, option in zip(LETTERS, options, strict=False))
    raise SampleError("wrong_answer", f"the answer {shown(value)} is none of the options {listed[:200]}")


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
