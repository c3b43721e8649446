"""One raw record of any layout -> Samples whose answer a model will generate.

In: as for layouts.py, but the record needs no answer. Out: one Sample for each question. Its conversation ends in an
empty assistant turn, the place of the answer.
"""

from collections.abc import Sequence
from typing import Any

from smolray.config import DataConfig
from smolray.data.formats.columns import CAPTION_COLUMNS, LABEL_COLUMNS, RawRecord, Row, own_id, question_column
from smolray.data.formats.image_columns import IMAGE_COLUMNS, has_image, image_values
from smolray.data.formats.images import ImageReader
from smolray.data.formats.layouts import (
    CAPTION_PROMPT,
    LABEL_PROMPT,
    Parsed,
    conversation_parser,
    with_images,
)
from smolray.data.formats.options import take_options
from smolray.data.formats.question import earlier_turns, prompt_messages, question_text
from smolray.data.formats.turns import assistant_turn, check_text, read_messages, user_turn
from smolray.data.sample import Conversation, Message, Sample, SampleError


def parse_questions(
    record: RawRecord, row_id: str, data: DataConfig, images: ImageReader, prompts: Sequence[str] = ()
) -> list[Sample]:
    """The questions of one record; answers that it holds are left out.

    `prompts`: texts that replace `data.prompt`, a conversation for each. They replace the row's own question, or
    stand before the question where `data.columns.question` names its column. Ids are those of `parse`. Raises
    SampleError.
    """
    row = Row(record, data)
    row.check_named({"image", "question", "id"})
    if prompts and not data.columns.question:
        conversations, embedded = _prompts_about_images(row, prompts)
    else:
        conversations, embedded = [], []
        for prompt in prompts or (data.prompt,):
            found, embedded = _questions(Row(record, data.replace({"prompt": prompt})))
            conversations += found

    own = own_id(row) or row_id
    row_images = tuple(images.read(value) for value in image_values(row, embedded))

    samples = []
    for number, conversation in enumerate(conversations):
        name = conversation.id or (own if len(conversations) == 1 else f"{own}/{number + 1}")
        asked = with_images(row, conversation, row_images)
        turns = _turns_before_the_answer(asked)
        conversation = Conversation(name, (*turns, assistant_turn("")))
        check_text(conversation)
        samples.append(Sample(asked.images, conversation))
    return samples


def _prompts_about_images(row: Row, prompts: Sequence[str]) -> Parsed:
    """Each prompt as a conversation about the row's images, inside its messages or in a column of their own."""
    embedded: list[Any] = []
    if row.has("messages"):
        _, embedded = read_messages(row.record["messages"], "messages")
    if not embedded and not has_image(row):
        raise SampleError(
            "wrong_columns",
            f"the row has no image to ask about; {row.columns_found()}; "
            f"expected one of {', '.join(IMAGE_COLUMNS)}, or name it in data.columns.image",
        )
    return [Conversation("", (user_turn(text),)) for text in prompts], embedded


def _turns_before_the_answer(asked: Sample) -> list[Message]:
    """The turns up to the last that is not the assistant's. Raises SampleError."""
    turns = list(asked.conversation.messages)
    while turns and turns[-1].role == "assistant":
        turns.pop()

    if not turns:
        raise SampleError("no_turn", "the row asks nothing")
    if (placed := sum(p.type == "image" for m in turns for p in m.content)) != len(asked.images):
        raise SampleError("image_count", f"the messages place {placed} images, the row has {len(asked.images)}")
    return turns


def _questions(row: Row) -> Parsed:
    """The conversations of a record, with or without answers.

    The record is a row of prepared shards, has any layout for training, or has only a question, a prompt or an image.
    """
    data, named = row.data, row.data.columns.question
    if not named and (parsed := _conversations(row)) is not None:
        return parsed

    if column := question_column(row):
        return [Conversation("", _asked(row, column))], []
    if named:
        raise SampleError("wrong_type", f"the question in column {named!r} is empty; expected text")

    if has_image(row):
        labelled = row.find(LABEL_COLUMNS) and not row.find(CAPTION_COLUMNS)
        return [Conversation("", (user_turn(data.prompt or (LABEL_PROMPT if labelled else CAPTION_PROMPT)),))], []
    raise SampleError(
        "wrong_columns",
        f"nothing to ask; {row.columns_found()}; expected an image, question, prompt or messages; "
        "or name them in data.columns.*",
    )


def _conversations(row: Row) -> Parsed | None:
    """The complete conversations of the record, or its prompt; None where it has neither."""
    stored = row.record.get("conversations")
    if row.has("key", "images", "conversations") and all(isinstance(c, str) for c in stored or [None]):
        return [Conversation.from_json(text) for text in row.record["conversations"]], []
    if parser := conversation_parser(row):
        return parser(row)
    if row.has("prompt"):
        value = row.use("prompt", "question")
        if isinstance(value, str):
            return [Conversation("", _asked(row, "prompt"))], []
        messages, embedded = prompt_messages(value, "prompt")
        return [Conversation("", messages)], embedded
    return None


def _asked(row: Row, column: str) -> tuple[Message, ...]:
    """The turns up to the question in a column, with its options."""
    return (*earlier_turns(row), user_turn(question_text(row, column, take_options(row))))
