"""What stands before the answer of a row: a system turn, earlier turns, and its question with context and options.

In: a Row. Out: Messages; their columns are then used.
"""

from collections.abc import Sequence
from typing import Any

from smolray.config import DataConfig
from smolray.data.formats.columns import Row
from smolray.data.formats.options import with_options
from smolray.data.formats.turns import Messages, assistant_turn, read_messages, system_turn, user_turn
from smolray.data.formats.values import is_empty, is_nan_text, list_of, text_of
from smolray.data.sample import Message

SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
CONTEXT_COLUMNS = ("context", "passage", "hint", "instruction", "input")
HISTORY_COLUMNS = ("history",)


def question_text(row: Row, column: str, options: Sequence[str] = ()) -> str:
    """The question in a column, behind data.prompt and its context and before its options, each on a line of its own.

    Alpaca's `input` stands behind its `instruction`.
    """
    question = text_of(row.use(column, "question"), "the question")
    before, behind = list[str](), list[str]()
    for name in (row.data.columns.context,) if row.data.columns.context else CONTEXT_COLUMNS:
        context = row.find((name,))
        if context and context not in row.used and (text := _context(row, context)):
            alpaca = name == "input" and column.lower() in ("instruction", "prompt")
            (behind if alpaca else before).append(text)
    return with_prompt(with_options("\n".join([*before, question, *behind]), options), row.data)


def _context(row: Row, column: str) -> str:
    """The text of a context column, or its texts line by line; empty, and not used, where it holds something else."""
    value = row.record[column]
    texts = value if isinstance(value, list | tuple) else [value]
    if is_empty(value) or is_nan_text(value) or not all(isinstance(text, str) for text in texts):
        return ""
    return "\n".join(row.use(column, "context") if isinstance(value, list | tuple) else [row.use(column, "context")])


def earlier_turns(row: Row) -> tuple[Message, ...]:
    """The turns of `history` before the question: a list of [question, answer], or of messages."""
    turns: list[Message] = []
    column = row.find(HISTORY_COLUMNS)
    for pair in list_of(row.use(column, "history"), column) if column and not is_empty(row.record[column]) else ():
        if isinstance(pair, list | tuple) and len(pair) == 2:
            turns += [
                user_turn(text_of(pair[0], f"a question of {column!r}")),
                assistant_turn(text_of(pair[1], f"an answer of {column!r}")),
            ]
        else:
            turns += read_messages([pair], column)[0]
    return tuple(turns)


def with_system(row: Row, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns behind a system turn from the row's own column, unless they have one."""
    column = row.find((row.data.columns.system,) if row.data.columns.system else SYSTEM_COLUMNS)
    if not column or is_empty(row.record[column]) or not isinstance(row.record[column], str):
        return messages
    text = row.record[column]
    if any(m.role == "system" for m in messages):
        if any(m.role == "system" and m.text.strip() == text.strip() for m in messages):
            row.use(column, "system")
        return messages
    return (system_turn(row.use(column, "system")), *messages)


def prompt_messages(value: Any, name: str) -> Messages:
    """A prompt of a text or of messages, and the image values inside it."""
    return ((user_turn(value),), []) if isinstance(value, str) else read_messages(value, name)


def ending_messages(value: Any, name: str) -> Messages:
    """An answer of a text or of messages, and the image values inside it."""
    return ((assistant_turn(value),), []) if isinstance(value, str) else read_messages(value, name)


def with_prompt(question: str, data: DataConfig) -> str:
    """The question, after data.prompt where that is set."""
    return f"{data.prompt}\n{question}" if data.prompt else question
