"""One raw record of any known layout -> Samples.

The layouts: VQA, captions, labels, LLaVA, The Cauldron, and TRL's conversational and preference formats.

In: a dict of column values, from any data format, and a name for the row. Out: a checked Sample for each conversation.
Text stays text: a literal `<image>` is the place of an image only in LLaVA's `conversations`, where the format says so.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from smolray.config import DataConfig
from smolray.data.formats.columns import (
    ANSWER_COLUMNS,
    CAPTION_COLUMNS,
    LABEL_COLUMNS,
    RawRecord,
    Row,
    own_id,
    question_column,
    type_of,
)
from smolray.data.formats.images import ImageReader
from smolray.data.formats.pictures import has_image, image_values
from smolray.data.formats.turns import assistant_turn, check_text, place_images, read_messages, role_of, user_turn
from smolray.data.formats.unused import ParsedRow
from smolray.data.formats.values import list_of, shown, text_of
from smolray.data.sample import Conversation, Message, Part, Sample, SampleError, check_sample

EXPECTED = (
    "messages | conversations | texts | prompt + completion | [prompt +] chosen + rejected | question + answer(s) | "
    "an image + caption(s), text or label"
)
CAPTION_PROMPT = "Describe the image."
LABEL_PROMPT = "What is in the image?"
LLAVA_ROLES = {"human": "user", "gpt": "assistant"}

Parsed = tuple[list[Conversation], list[Any]]  # conversations without ids, image values found inside messages
Parser = Callable[[Row], Parsed]


def parse(record: RawRecord, row_id: str, data: DataConfig, images: ImageReader) -> ParsedRow:
    """The samples of one record, and what its columns were used as. Each of several captions becomes its own
    conversation.

    Ids: the row's own (`data.columns.id`, question_id, id) or `row_id`, followed by `/1`, `/2` … where a row has
    several conversations. `data.prompt` is put before a question (VQA, a string prompt) or is the whole question
    (captions, labels); messages have their own. Raises SampleError where the row cannot be trained on: a row keeps
    all of its conversations or none.
    """
    row = Row(record, data)
    row.check_named()
    own, kind = own_id(row) or row_id, type_of(row)
    conversations, embedded = _layout(row)(row)
    row_images = tuple(images.read(value) for value in image_values(row, embedded))

    samples = []
    for number, conversation in enumerate(conversations):
        name = own if len(conversations) == 1 else f"{own}/{number + 1}"
        messages = place_images(conversation.messages, len(row_images))
        conversation = replace(conversation, id=name, type=kind, messages=messages)
        check_text(conversation)
        sample = Sample(row_images, conversation)
        check_sample(sample)
        samples.append(sample)
    return ParsedRow(samples, row.used)


def _layout(row: Row) -> Parser:
    """The parser for this record's columns: by data.columns.answer where it is set, else the first that fits."""
    question, answer = question_column(row), row.find(ANSWER_COLUMNS)
    if row.data.columns.answer:
        return _vqa if question else _caption
    if parser := conversation_parser(row):
        return parser

    if row.has("prompt", "completion"):
        return _prompt_completion
    if question and answer:
        return _vqa
    if has_image(row) and row.find((*CAPTION_COLUMNS, *LABEL_COLUMNS)):
        return _caption

    if question and not row.lacks(ANSWER_COLUMNS):
        raise SampleError("empty_answer", "the row has no answer")
    raise SampleError(
        "wrong_columns",
        f"no known layout; {row.columns_found()}; expected {EXPECTED}; or name them in data.columns.*",
    )


def conversation_parser(row: Row) -> Parser | None:
    """The parser for columns that hold whole conversations; None where there is no such column."""
    if row.has("chosen", "rejected"):
        return _preference
    for column, parser in (("messages", _messages), ("conversations", _conversations), ("texts", _cauldron)):
        if row.has(column):
            return parser
    return None


def _vqa(row: Row) -> Parsed:
    """A question with one or more answers, as in VQAv2.

    All annotators' answers are kept; the trained one is multiple_choice_answer, else the most common.
    """
    question = text_of(row.use(question_column(row), "question"), "the question")
    trained, answers = "", tuple[str, ...]()
    named = row.data.columns.answer
    columns = [named] if named else [c for c in (row.find((name,)) for name in ANSWER_COLUMNS) if c]
    if len(columns) > 1 and columns[-1] == "label":  # a class next to the answers is not an answer
        columns.pop()

    for column in columns:
        values = answers_of(row.use(column, "answer"), column)
        trained = trained or (Counter(values).most_common(1)[0][0] if values else "")
        answers = values if len(values) > len(answers) else answers
    if not trained.strip():
        raise SampleError("empty_answer", "the answer is empty")

    turns = (user_turn(with_prompt(question, row.data)), assistant_turn(trained))
    return [Conversation("", turns, answers=answers or (trained,))], []


def _caption(row: Row) -> Parsed:
    column = row.data.columns.answer or row.find((*CAPTION_COLUMNS, *LABEL_COLUMNS))
    captions = answers_of(row.use(column, "label" if column in LABEL_COLUMNS else "caption"), column)
    if not captions or not all(c.strip() for c in captions):
        raise SampleError(
            "empty_answer", f"{column!r} holds an empty caption" if captions else f"{column!r} holds no caption"
        )

    question = row.data.prompt or (LABEL_PROMPT if column in LABEL_COLUMNS else CAPTION_PROMPT)
    return [Conversation("", (user_turn(question), assistant_turn(c)), answers=captions) for c in captions], []


def _messages(row: Row) -> Parsed:
    messages, embedded = read_messages(row.use("messages", "messages"), "messages")
    return [Conversation("", messages)], embedded


def _conversations(row: Row) -> Parsed:
    """LLaVA: [{from: human | gpt | system, value}], where `<image>` in a human turn is the place of an image."""
    turns = list_of(row.use("conversations", "messages"), "conversations")
    if turns and isinstance(turns[0], Mapping) and "role" in turns[0]:
        messages, embedded = read_messages(turns, "conversations")
        return [Conversation("", messages)], embedded

    llava = []
    for turn in turns:
        if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
            raise SampleError("wrong_type", f"a turn of conversations is {shown(turn)}; expected {{from, value}}")
        role = role_of(LLAVA_ROLES.get(str(turn["from"]), turn["from"]))
        text = text_of(turn["value"], "the value of a turn")

        # The line break next to a marker belongs to the notation.
        texts = re.split(r"\n?<image>\n?", text) if role == "user" else [text]
        parts = [Part("text", texts[0])]
        for behind in texts[1:]:
            parts += [Part("image"), Part("text", behind)]
        llava.append(Message(role, tuple(p for p in parts if p.type == "image" or p.text)))
    return [Conversation("", tuple(llava))], []


def _cauldron(row: Row) -> Parsed:
    """The Cauldron: [{user, assistant}], turns of one conversation about the row's images."""
    messages = []
    for turn in list_of(row.use("texts", "messages"), "texts"):
        if not isinstance(turn, Mapping) or "user" not in turn or "assistant" not in turn:
            raise SampleError("wrong_type", f"a turn of texts is {shown(turn)}; expected {{user, assistant}}")
        messages += [user_turn(text_of(turn["user"], "user")), assistant_turn(text_of(turn["assistant"], "assistant"))]
    return [Conversation("", tuple(messages))], []


def _prompt_completion(row: Row) -> Parsed:
    prompt, embedded = prompt_messages(row.use("prompt", "question"), "prompt", row.data)
    completion, inside = _ending(row.use("completion", "answer"), "completion")
    return [Conversation("", prompt + completion)], embedded + inside


def _preference(row: Row) -> Parsed:
    """TRL's preference formats.

    The prompt is explicit, and the endings may repeat it; or it is implicit, the common beginning of both endings.
    """
    chosen, rejected = row.use("chosen", "chosen"), row.use("rejected", "rejected")
    column = row.find(("prompt",)) or question_column(row)
    prompt = row.use(column, "question") if column else None
    if prompt is None:
        prompt, chosen, rejected = _split_implicit(chosen, rejected)
    elif isinstance(prompt, str) and all(
        isinstance(text, str) and text.startswith(prompt) for text in (chosen, rejected)
    ):
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]

    messages, embedded = prompt_messages(prompt, "prompt", row.data)
    bare, _ = prompt_messages(prompt, "prompt", None)
    endings = []
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        ending, _ = _ending(value, name)
        repeats_prompt = len(ending) > len(bare) and ending[: len(bare)] == bare
        endings.append(ending[len(bare) :] if repeats_prompt else ending)
    return [Conversation("", messages, chosen=endings[0], rejected=endings[1])], embedded


def _split_implicit(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Prompt and endings of two texts or message lists with a common beginning, as `trl.extract_prompt` cuts them."""
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise SampleError("wrong_type", "chosen and rejected have different types")
    if not isinstance(chosen, str):
        chosen, rejected = list_of(chosen, "chosen"), list_of(rejected, "rejected")

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


def answers_of(value: Any, name: str) -> tuple[str, ...]:
    """The answers in a value: one answer, a list of them, VQAv2's list of {answer, …}, or that as a dict of lists."""
    if isinstance(value, Mapping) and "answer" in value:
        value = value["answer"]
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(text_of(v.get("answer") if isinstance(v, Mapping) else v, f"a value of {name!r}") for v in values)


def prompt_messages(value: Any, name: str, data: DataConfig | None) -> tuple[tuple[Message, ...], list[Any]]:
    """The prompt of a record as messages, and the image values inside them; without `data` no instruction is added."""
    if isinstance(value, str):
        return (user_turn(with_prompt(value, data) if data else value),), []
    return read_messages(value, name)


def _ending(value: Any, name: str) -> tuple[tuple[Message, ...], list[Any]]:
    return ((assistant_turn(value),), []) if isinstance(value, str) else read_messages(value, name)


def with_prompt(question: str, data: DataConfig) -> str:
    """The question, after data.prompt where that is set."""
    return f"{data.prompt}\n{question}" if data.prompt else question
