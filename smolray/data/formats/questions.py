"""One raw record of any layout -> Samples whose answer a model will generate.

In: as for layouts.py, but the record needs no answer. Out: one Sample for each question. Its conversation ends in an
empty assistant turn, the place of the answer.
"""

from collections.abc import Sequence
from typing import Any

from smolray.config import DataConfig
from smolray.data.formats.columns import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    RawRecord,
    check_named_columns,
    columns_found,
    filled_columns,
    has_image,
    image_values,
    own_id,
    question_of,
    text_of,
)
from smolray.data.formats.images import ImageReader
from smolray.data.formats.layouts import (
    CAPTION_PROMPT,
    LABEL_PROMPT,
    Parsed,
    conversation_parser,
    prompt_messages,
    with_prompt,
)
from smolray.data.formats.turns import assistant_turn, check_text, place_images, read_messages, user_turn
from smolray.data.sample import Conversation, Message, Sample, SampleError


def parse_questions(
    record: RawRecord, row_id: str, data: DataConfig, images: ImageReader, prompts: Sequence[str] = ()
) -> list[Sample]:
    """The questions of one record; answers that it holds are left out.

    `prompts`: texts that replace `data.prompt`, a conversation for each. They replace the row's own question, or
    stand before the question where `data.columns.question` names its column. Ids are those of `parse`. Raises
    SampleError.
    """
    check_named_columns(record, data, {"image", "question", "id"})
    if prompts and not data.columns.question:
        conversations, embedded = _prompts_about_images(record, data, prompts)
    else:
        conversations, embedded = [], []
        for prompt in prompts or (data.prompt,):
            found, embedded = _questions(record, data.replace({"prompt": prompt}))
            conversations += found

    own = own_id(record, data) or row_id
    row_images = tuple(images.read(value) for value in image_values(record, data, embedded))

    samples = []
    for number, conversation in enumerate(conversations):
        name = conversation.id or (own if len(conversations) == 1 else f"{own}/{number + 1}")
        turns = _turns_before_the_answer(conversation, len(row_images))
        conversation = Conversation(name, (*turns, assistant_turn("")))
        check_text(conversation)
        samples.append(Sample(row_images, conversation))
    return samples


def _prompts_about_images(record: RawRecord, data: DataConfig, prompts: Sequence[str]) -> Parsed:
    """Each prompt as a conversation about the row's images, inside its messages or in a column of their own."""
    embedded: list[Any] = []
    if record.get("messages") is not None:
        _, embedded = read_messages(record["messages"], "messages")
    if not embedded and not has_image(record, data):
        raise SampleError(
            "wrong_columns",
            f"the row has no image to ask about; {columns_found(record)}; "
            f"expected one of {', '.join(IMAGE_COLUMNS)}, or name it in data.columns.image",
        )
    return [Conversation("", (user_turn(text),)) for text in prompts], embedded


def _turns_before_the_answer(conversation: Conversation, images: int) -> list[Message]:
    """The turns up to the last that is not the assistant's, with all images in their places. Raises SampleError."""
    turns = list(place_images(conversation.messages, images))
    while turns and turns[-1].role == "assistant":
        turns.pop()

    if not turns:
        raise SampleError("no_turn", "the row asks nothing")
    if (placed := sum(p.type == "image" for m in turns for p in m.content)) != images:
        raise SampleError("image_count", f"the messages place {placed} images, the row has {images}")
    return turns


def _questions(record: RawRecord, data: DataConfig) -> Parsed:
    """The conversations of a record, with or without answers.

    The record is a row of prepared shards, has any layout for training, or has only a question, a prompt or an image.
    """
    filled = filled_columns(record)
    if not data.columns.question and (parsed := _conversations(record, data, filled)) is not None:
        return parsed

    if (question := question_of(record, data)) is not None:
        return [Conversation("", (user_turn(with_prompt(text_of(question, "the question"), data)),))], []
    if data.columns.question:
        raise SampleError("wrong_type", f"the question in column {data.columns.question!r} is empty; expected text")

    if has_image(record, data):
        labelled = filled & set(LABEL_COLUMNS) and not filled & set(CAPTION_COLUMNS)
        return [Conversation("", (user_turn(data.prompt or (LABEL_PROMPT if labelled else CAPTION_PROMPT)),))], []
    raise SampleError(
        "wrong_columns",
        f"nothing to ask; {columns_found(record)}; expected an image, question, prompt or messages; "
        "or name them in data.columns.*",
    )


def _conversations(record: RawRecord, data: DataConfig, filled: set[str]) -> Parsed | None:
    """The complete conversations of the record, or its prompt; None where it has neither."""
    if {"key", "images", "conversations"} <= filled and all(isinstance(c, str) for c in record["conversations"]):
        return [Conversation.from_json(text) for text in record["conversations"]], []
    if parser := conversation_parser(filled):
        return parser(record, data)
    if "prompt" in filled:
        messages, embedded = prompt_messages(record["prompt"], "prompt", data)
        return [Conversation("", messages)], embedded
    return None
