"""Preference data -> a prompt with a chosen and a rejected ending.

The layouts: TRL's (strings or messages, prompt explicit or implicit), ms-swift's `rejected_response`, LLaMA-Factory's
conversations with `chosen` and `rejected`, RLHF-V's JSON in `text`.
"""

import json
from typing import Any

from smolray.data.formats.columns import ANSWER_COLUMNS, MESSAGE_COLUMNS, Row, question_column
from smolray.data.formats.question import earlier_turns, ending_messages, prompt_messages, question_text, with_prompt
from smolray.data.formats.turns import read_messages, user_turn
from smolray.data.formats.values import list_of
from smolray.data.sample import Conversation, Message, SampleError

CHOSEN_COLUMNS = ("chosen", "chosen_response", "chosen_answer", "response_chosen", "preferred")
REJECTED_COLUMNS = (
    *("rejected", "rejected_response", "rejected_answer", "rejected_messages", "response_rejected"),
    *("dispreferred", "non_preferred"),
)


def is_preference(row: Row) -> bool:
    """Whether the row has a rejected answer and one that may be the chosen one."""
    _read_json_text(row)
    answers = (*CHOSEN_COLUMNS, *MESSAGE_COLUMNS, "completion", *ANSWER_COLUMNS)
    return bool(row.find(REJECTED_COLUMNS) and row.find(answers))


def parse_preference(row: Row) -> tuple[list[Conversation], list[Any]]:
    """The pairs of a row: one, or one for each of several rejected answers. Raises SampleError."""
    column = row.find(REJECTED_COLUMNS)
    rejected = row.use(column, "rejected")
    several = isinstance(rejected, list | tuple) and rejected and all(isinstance(text, str) for text in rejected)

    conversations: list[Conversation] = []
    embedded: list[Any] = []
    for one in rejected if several else [rejected]:
        conversation, embedded = _pair(row, one)
        if _said(conversation.chosen) == _said(conversation.rejected):
            raise SampleError("equal_pair", "the chosen and the rejected answer are the same")
        conversations.append(conversation)
    return conversations, embedded


def _read_json_text(row: Row) -> None:
    """Put the keys of a JSON object in `text` into the row, where they are a pair of answers."""
    text = row.record.get("text")
    if not isinstance(text, str) or not text.lstrip().startswith("{") or '"rejected"' not in text:
        return
    try:
        inner = json.loads(text)
    except (ValueError, RecursionError):
        return
    if isinstance(inner, dict) and {"chosen", "rejected"} <= {*inner}:
        row.add(inner)
        row.use("text", "chosen and rejected")


def _pair(row: Row, rejected: Any) -> tuple[Conversation, list[Any]]:
    """One pair of a row.

    The prompt is explicit, and the endings may repeat it; or it is implicit, the common beginning of both endings.
    """
    given = row.find(CHOSEN_COLUMNS)
    column = row.find(("prompt",)) or question_column(row)
    history = "" if given and column else row.find(MESSAGE_COLUMNS)
    turns = list_of(row.record[history], history) if history else []
    if given and any(m.role == "assistant" for m in read_messages(turns[-1:], history)[0]):
        history = ""  # the messages are those of the chosen answer

    prompt: Any = None
    if history:
        row.use(history, "messages")
        prompt, chosen = (turns, row.use(given, "chosen")) if given else (turns[:-1], turns[-1:])
    else:
        chosen = row.use(given or row.find(("completion", *ANSWER_COLUMNS)), "chosen")
        prompt = row.use(column, "question") if column else None

    if prompt is None:
        prompt, chosen, rejected = _split_implicit(chosen, rejected)
        asked = prompt_messages(with_prompt(prompt, row.data) if isinstance(prompt, str) else prompt, "prompt")
    elif isinstance(prompt, str):
        if all(isinstance(text, str) and text.startswith(prompt) for text in (chosen, rejected)):
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        asked = ((*earlier_turns(row), user_turn(question_text(row, column))), [])
    else:
        asked = prompt_messages(prompt, "prompt")

    bare = prompt_messages(prompt, "prompt")[0]
    endings = [
        _without_prompt(ending_messages(value, name)[0], bare)
        for name, value in (("chosen", chosen), ("rejected", rejected))
    ]
    messages = asked[0]
    (systems, first), (_, second) = endings
    if systems and not any(m.role == "system" for m in messages):
        messages = (*systems, *messages)
    return Conversation("", messages, chosen=first, rejected=second), asked[1]


def _without_prompt(
    ending: tuple[Message, ...], prompt: tuple[Message, ...]
) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """System turns that an ending repeats before the prompt, and the ending without both."""
    asked = tuple(m for m in prompt if m.role != "system")
    start = next((n for n, m in enumerate(ending) if m.role != "system"), 0)
    if len(ending) > start + len(asked) and ending[start : start + len(asked)] == asked and asked:
        return ending[:start], ending[start + len(asked) :]
    return (), ending


def _said(turns: tuple[Message, ...]) -> list[tuple[str, str]]:
    return [(m.role, m.text.strip()) for m in turns]


def _split_implicit(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Prompt and endings of two texts or message lists with a common beginning, as `trl.extract_prompt` cuts them."""
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise SampleError("wrong_type", "chosen and rejected have different types")
    if not isinstance(chosen, str):
        chosen, rejected = list_of(chosen, "chosen"), list_of(rejected, "rejected")
    if chosen == rejected:
        raise SampleError("equal_pair", "the chosen and the rejected answer are the same")

    differing = (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    cut = next(differing, min(len(chosen), len(rejected)))
    if isinstance(chosen, str) and cut and chosen[cut - 1] == " ":
        cut -= 1

    if cut == 0:
        raise SampleError(
            "no_turn", "there is no prompt, and chosen and rejected have no common beginning to use as one"
        )
    if cut in (len(chosen), len(rejected)):
        raise SampleError("no_turn", "there is no prompt, and one of chosen and rejected is the beginning of the other")
    return chosen[:cut], chosen[cut:], rejected[cut:]
