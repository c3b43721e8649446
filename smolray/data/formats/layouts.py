"""One raw record of any known layout -> Samples: VQA, captions, labels, LLaVA, The Cauldron, TRL's conversational and
preference formats.

In: a dict of column values (from Parquet, a tar, JSON or the hub) and the name of its place. Out: one Sample a
conversation, checked. Text stays text: a literal `<image>` is a marker only in LLaVA's `conversations`, where it is the
notation of the format.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from smolray.config import DataConfig
from smolray.data.formats.images import ImageReader
from smolray.data.sample import ROLES, Conversation, Message, Part, Sample, SampleError, check_sample

RawRecord = Mapping[str, Any]

IMAGE_COLUMNS = ("images", "image", "jpg", "jpeg", "png", "webp", "img")
QUESTION_COLUMNS = ("question", "query")
ANSWER_COLUMNS = ("multiple_choice_answer", "answer", "answers", "label")
CAPTION_COLUMNS = ("captions", "caption", "text", "txt")
LABEL_COLUMNS = ("label", "cls")
ID_COLUMNS = ("question_id", "questionId", "id")
TYPE_COLUMNS = ("answer_type", "question_type", "question_types", "type")
EXPECTED = (
    "messages | conversations | texts | prompt + completion | [prompt +] chosen + rejected | question + answer(s) | "
    "an image + caption(s), text or label"
)
CAPTION_PROMPT = "Describe the image."
LABEL_PROMPT = "What is in the image?"
LLAVA_ROLES = {"human": "user", "gpt": "assistant"}
MAX_TEXT = 16 * 2**20  # characters in a row; beyond it a row is an accident, and a batch of them a full memory


def parse(record: RawRecord, row_id: str, data: DataConfig, images: ImageReader) -> list[Sample]:
    """The samples of one record; several captions give one conversation each, so nothing is lost.

    Ids: the row's own (`data.columns.id`, question_id, id) or `row_id`, with `/1`, `/2` … behind it where a row has
    several conversations. `data.prompt` stands before a question (VQA, a string prompt) or is the whole question
    (captions, labels); messages carry their own. Raises SampleError for a row that cannot be trained on, whole: either
    all of its conversations are kept or none.
    """
    for key, column in data.columns.model_dump().items():
        if column and column not in record:
            raise SampleError("wrong_columns", f"column {column!r} (data.columns.{key}) is not there; {_found(record)}")
    own, kind = own_id(record, data) or row_id, _type(record, data)
    conversations, embedded = _layout(record, data)(record, data)
    pictures = tuple(images.read(value) for value in _image_values(record, data, embedded))
    samples = []
    for number, conversation in enumerate(conversations):
        name = own if len(conversations) == 1 else f"{own}/{number + 1}"
        conversation = replace(conversation, id=name, type=kind, messages=_place(conversation.messages, len(pictures)))
        _check_text(conversation)
        sample = Sample(pictures, conversation)
        check_sample(sample)
        samples.append(sample)
    return samples


def parse_questions(
    record: RawRecord, row_id: str, data: DataConfig, images: ImageReader, asked: Sequence[str] = ()
) -> list[Sample]:
    """What one record asks; answers that it holds are left aside.

    Each conversation ends in an empty assistant turn, the place of the answer.

    `asked`: texts in place of `data.prompt`, a conversation each. They are asked of the row's images in place of its
    own question, or stand before the question in `data.columns.question` where that is named. Ids are those of `parse`.
    Raises SampleError.
    """
    for key, column in data.columns.model_dump(include={"image", "question", "id"}).items():
        if column and column not in record:
            raise SampleError("wrong_columns", f"column {column!r} (data.columns.{key}) is not there; {_found(record)}")
    if asked and not data.columns.question:
        _, embedded = read_messages(record["messages"], "messages") if record.get("messages") is not None else ((), [])
        conversations = [Conversation("", (_user(text),)) for text in asked]
        if not embedded and not _has_image(record, data):
            raise SampleError(
                "wrong_columns",
                f"the row has no image to ask about; {_found(record)}; expected one of {', '.join(IMAGE_COLUMNS)}, "
                "or name it in data.columns.image",
            )
    else:
        conversations, embedded = [], []
        for prompt in asked or (data.prompt,):
            found, embedded = _questions(record, data.replace({"prompt": prompt}))
            conversations += found
    own = own_id(record, data) or row_id
    pictures = tuple(images.read(value) for value in _image_values(record, data, embedded))
    samples = []
    for number, conversation in enumerate(conversations):
        name = conversation.id or (own if len(conversations) == 1 else f"{own}/{number + 1}")
        turns = list(_place(conversation.messages, len(pictures)))
        while turns and turns[-1].role == "assistant":
            turns.pop()
        if not turns:
            raise SampleError("no_turn", "nothing is asked")
        if (placed := sum(p.type == "image" for m in turns for p in m.content)) != len(pictures):
            raise SampleError("image_count", f"the messages place {placed} images, the row has {len(pictures)}")
        conversation = Conversation(name, (*turns, _assistant("")))
        _check_text(conversation)
        samples.append(Sample(pictures, conversation))
    return samples


Parsed = tuple[list[Conversation], list[Any]]  # conversations without ids, image values found inside messages


def _layout(record: RawRecord, data: DataConfig) -> Callable[[RawRecord, DataConfig], Parsed]:
    """The parser for this record's columns; an explicit answer column settles it, else the first layout that fits."""
    if data.columns.answer:
        return _vqa if _question(record, data) is not None else _caption
    has = {name for name, value in record.items() if value is not None}
    if {"chosen", "rejected"} <= has:
        return _preference
    for column, parser in (("messages", _messages), ("conversations", _conversations), ("texts", _cauldron)):
        if column in has:
            return parser
    if {"prompt", "completion"} <= has:
        return _prompt_completion
    if _question(record, data) is not None and has & set(ANSWER_COLUMNS):
        return _vqa
    if _has_image(record, data) and has & {*CAPTION_COLUMNS, *LABEL_COLUMNS}:
        return _caption
    raise SampleError(
        "wrong_columns", f"no known layout; {_found(record)}; expected {EXPECTED}; or name them in data.columns.*"
    )


def _questions(record: RawRecord, data: DataConfig) -> Parsed:
    """The conversations of a record that need hold no answers: prepared shards, any layout that is trained on, a
    question, a prompt, or an image alone.
    """
    has = {name for name, value in record.items() if value is not None}
    if not data.columns.question:
        if {"key", "images", "conversations"} <= has and all(isinstance(c, str) for c in record["conversations"]):
            return [Conversation.from_json(text) for text in record["conversations"]], []
        if {"chosen", "rejected"} <= has:
            return _preference(record, data)
        for column, parser in (("messages", _messages), ("conversations", _conversations), ("texts", _cauldron)):
            if column in has:
                return parser(record, data)
        if "prompt" in has:
            messages, embedded = _prompt(record["prompt"], "prompt", data)
            return [Conversation("", messages)], embedded
    if (question := _question(record, data)) is not None:
        return [Conversation("", (_user(_with_prompt(_string(question, "the question"), data)),))], []
    if data.columns.question:
        raise SampleError("wrong_type", f"the question in column {data.columns.question!r} is empty; expected text")
    if _has_image(record, data):
        labelled = has & set(LABEL_COLUMNS) and not has & set(CAPTION_COLUMNS)
        return [Conversation("", (_user(data.prompt or (LABEL_PROMPT if labelled else CAPTION_PROMPT)),))], []
    raise SampleError(
        "wrong_columns",
        f"nothing to ask; {_found(record)}; expected an image, question, prompt or messages; or name them in data.columns.*",
    )


def _vqa(record: RawRecord, data: DataConfig) -> Parsed:
    """VQAv2 and its kin.

    All annotators' answers are kept; the one to learn is multiple_choice_answer, else the most common.
    """
    question = _string(_question(record, data), "the question")
    trained, answers = "", tuple[str, ...]()
    columns = [data.columns.answer] if data.columns.answer else [c for c in ANSWER_COLUMNS if record.get(c) is not None]
    for column in columns[:-1] if len(columns) > 1 and columns[-1] == "label" else columns:
        values = _answers(record[column], column)
        trained = trained or (Counter(values).most_common(1)[0][0] if values else "")
        answers = values if len(values) > len(answers) else answers
    if not trained.strip():
        raise SampleError("empty_answer", "the answer is empty")
    return [
        Conversation("", (_user(_with_prompt(question, data)), _assistant(trained)), answers=answers or (trained,))
    ], []


def _caption(record: RawRecord, data: DataConfig) -> Parsed:
    column = data.columns.answer or next(c for c in (*CAPTION_COLUMNS, *LABEL_COLUMNS) if record.get(c) is not None)
    captions = _answers(record[column], column)
    if not captions or not all(c.strip() for c in captions):
        raise SampleError(
            "empty_answer", f"{column!r} holds an empty caption" if captions else f"{column!r} holds no caption"
        )
    question = data.prompt or (LABEL_PROMPT if column in LABEL_COLUMNS else CAPTION_PROMPT)
    return [Conversation("", (_user(question), _assistant(c)), answers=captions) for c in captions], []


def _messages(record: RawRecord, data: DataConfig) -> Parsed:
    messages, embedded = read_messages(record["messages"], "messages")
    return [Conversation("", messages)], embedded


def _conversations(record: RawRecord, data: DataConfig) -> Parsed:
    """LLaVA: [{from: human | gpt | system, value}], where `<image>` in a human turn is the place of an image."""
    turns = _list(record["conversations"], "conversations")
    if turns and isinstance(turns[0], Mapping) and "role" in turns[0]:
        messages, embedded = read_messages(turns, "conversations")
        return [Conversation("", messages)], embedded
    llava = []
    for turn in turns:
        if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
            raise SampleError("wrong_type", f"a turn of conversations is {_show(turn)}; expected {{from, value}}")
        role = _role(LLAVA_ROLES.get(str(turn["from"]), turn["from"]))
        text = _string(turn["value"], "the value of a turn")
        # The line break beside a marker belongs to the notation.
        pieces = re.split(r"\n?<image>\n?", text) if role == "user" else [text]
        parts = [Part("text", pieces[0])] + [
            part for piece in pieces[1:] for part in (Part("image"), Part("text", piece))
        ]
        llava.append(Message(role, tuple(p for p in parts if p.type == "image" or p.text)))
    return [Conversation("", tuple(llava))], []


def _cauldron(record: RawRecord, data: DataConfig) -> Parsed:
    """The Cauldron: [{user, assistant}], turns of one conversation about the row's images."""
    messages = []
    for turn in _list(record["texts"], "texts"):
        if not isinstance(turn, Mapping) or "user" not in turn or "assistant" not in turn:
            raise SampleError("wrong_type", f"a turn of texts is {_show(turn)}; expected {{user, assistant}}")
        messages += [_user(_string(turn["user"], "user")), _assistant(_string(turn["assistant"], "assistant"))]
    return [Conversation("", tuple(messages))], []


def _prompt_completion(record: RawRecord, data: DataConfig) -> Parsed:
    prompt, embedded = _prompt(record["prompt"], "prompt", data)
    completion, inside = _ending(record["completion"], "completion")
    return [Conversation("", prompt + completion)], embedded + inside


def _preference(record: RawRecord, data: DataConfig) -> Parsed:
    """TRL's preference formats: an explicit prompt (which the endings may repeat), or one implied by the common
    beginning.
    """
    chosen, rejected = record["chosen"], record["rejected"]
    prompt = record["prompt"] if record.get("prompt") is not None else _question(record, data)
    if prompt is None:
        prompt, chosen, rejected = _split_implicit(chosen, rejected)
    elif isinstance(prompt, str) and all(
        isinstance(text, str) and text.startswith(prompt) for text in (chosen, rejected)
    ):
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    messages, embedded = _prompt(prompt, "prompt", data)
    endings = []
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        bare, _ = _prompt(prompt, "prompt", None)
        ending, _ = _ending(value, name)
        endings.append(ending[len(bare) :] if len(ending) > len(bare) and ending[: len(bare)] == bare else ending)
    return [Conversation("", messages, chosen=endings[0], rejected=endings[1])], embedded


def _split_implicit(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Prompt and endings of two texts or message lists with a common beginning, as `trl.extract_prompt` cuts them."""
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise SampleError("wrong_type", "chosen and rejected are of two types")
    if not isinstance(chosen, str):
        chosen, rejected = _list(chosen, "chosen"), _list(rejected, "rejected")
    cut = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    if isinstance(chosen, str) and cut and chosen[cut - 1] == " ":
        cut -= 1
    if cut == 0:
        raise SampleError("no_turn", "no prompt, and chosen and rejected have no common beginning to take for one")
    if cut in (len(chosen), len(rejected)):
        raise SampleError("no_turn", "no prompt, and one of chosen and rejected holds nothing beyond the other")
    return chosen[:cut], chosen[cut:], rejected[cut:]


def read_messages(value: Any, name: str) -> tuple[tuple[Message, ...], list[Any]]:
    """TRL messages and the image values found inside their parts.

    Content is a string or a list of parts {type: text, text} / {type: image[, image]}. Raises SampleError (wrong_type,
    wrong_role).
    """
    messages, embedded = [], []
    for message in _list(value, name):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise SampleError("wrong_type", f"a message of {name} is {_show(message)}; expected {{role, content}}")
        content = message["content"]
        parts = []
        for part in [content] if isinstance(content, str) else _list(content, f"the content of a message of {name}"):
            kind = part.get("type") if isinstance(part, Mapping) else None
            if isinstance(part, str):
                parts.append(Part("text", part))
            elif kind == "text":
                parts.append(Part("text", _string(part.get("text"), "the text of a part")))
            elif kind == "image":
                parts.append(Part("image"))
                if part.get("image") is not None:
                    embedded.append(part["image"])
            else:
                raise SampleError("wrong_type", f"a part of a message is {_show(part)}; expected type text or image")
        messages.append(Message(_role(message["role"]), tuple(parts)))
    return tuple(messages), embedded


def _prompt(value: Any, name: str, data: DataConfig | None) -> tuple[tuple[Message, ...], list[Any]]:
    if isinstance(value, str):
        return (_user(_with_prompt(value, data) if data else value),), []
    return read_messages(value, name)


def _ending(value: Any, name: str) -> tuple[tuple[Message, ...], list[Any]]:
    return ((_assistant(value),), []) if isinstance(value, str) else read_messages(value, name)


def _place(messages: tuple[Message, ...], images: int) -> tuple[Message, ...]:
    """Where the messages place no image and the row has some, these stand first in the first user turn."""
    if not images or any(p.type == "image" for m in messages for p in m.content):
        return messages
    for number, message in enumerate(messages):
        if message.role == "user":
            return (
                *messages[:number],
                replace(message, content=(Part("image"),) * images + message.content),
                *messages[number + 1 :],
            )
    raise SampleError("no_turn", "the row has an image and no user turn to place it in")


def _image_columns(record: RawRecord, data: DataConfig) -> list[str]:
    columns = [data.columns.image] if data.columns.image else [c for c in IMAGE_COLUMNS if c in record]
    return [c for c in columns if record[c] is not None and record[c] != []]


def _has_image(record: RawRecord, data: DataConfig) -> bool:
    return bool(_image_columns(record, data))


def _image_values(record: RawRecord, data: DataConfig, embedded: list[Any]) -> list[Any]:
    """Image values in order: those inside the messages, else those of the first image column that holds any."""
    columns = _image_columns(record, data)
    if embedded and columns:
        raise SampleError(
            "image_count", f"images both inside the messages and in column {columns[0]!r}: which are meant is not clear"
        )
    if not columns:
        return embedded
    value = record[columns[0]]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _answers(value: Any, name: str) -> tuple[str, ...]:
    """One answer, a list of them, VQAv2's list of {answer, …}, or the same as a dict of lists."""
    if isinstance(value, Mapping) and "answer" in value:
        value = value["answer"]
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(_string(v.get("answer") if isinstance(v, Mapping) else v, f"a value of {name!r}") for v in values)


def _question(record: RawRecord, data: DataConfig) -> Any:
    if data.columns.question:
        return record[data.columns.question]
    return next((record[c] for c in QUESTION_COLUMNS if record.get(c) is not None), None)


def own_id(record: RawRecord, data: DataConfig) -> str:
    """The row's own id, empty where it has none. Raises SampleError where the named column holds none."""
    for column in [data.columns.id] if data.columns.id else ID_COLUMNS:
        value = record.get(column)
        if isinstance(value, (str, int)) and not isinstance(value, bool):
            return str(value)
        if data.columns.id:
            raise SampleError(
                "wrong_type", f"the id in column {column!r} is {_show(value)}; expected a string or an integer"
            )
    return ""


def _type(record: RawRecord, data: DataConfig) -> str:
    for column in [data.columns.type] if data.columns.type else TYPE_COLUMNS:
        value = record.get(column)
        if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
            return ", ".join(value)
        if isinstance(value, (str, int)):
            return str(value)
    return ""


def _check_text(conversation: Conversation) -> None:
    size = sum(len(m.text) for m in (*conversation.messages, *conversation.chosen, *conversation.rejected))
    if size > MAX_TEXT:
        raise SampleError("text_too_long", f"the row holds {size} characters; the limit is {MAX_TEXT}")
    try:
        conversation.to_json().encode()
    except UnicodeEncodeError as error:
        raise SampleError(
            "bad_text", f"the text holds {error.object[error.start : error.end]!r}, which is not Unicode text"
        ) from error


def _with_prompt(question: str, data: DataConfig) -> str:
    return f"{data.prompt}\n{question}" if data.prompt else question


def _user(text: str) -> Message:
    return Message("user", (Part("text", text),))


def _assistant(text: str) -> Message:
    return Message("assistant", (Part("text", text),))


def _role(value: Any) -> str:
    if value not in ROLES:
        raise SampleError("wrong_role", f"role {_show(value)}; expected {', '.join(ROLES)} (or LLaVA's human, gpt)")
    return value


def _string(value: Any, name: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    if not isinstance(value, str):
        raise SampleError("wrong_type", f"{name} is {_show(value)}; expected text")
    return value


def _list(value: Any, name: str) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise SampleError("wrong_type", f"{name} is {_show(value)}; expected a list")
    return value


def _show(value: Any) -> str:
    return f"{repr(value)[:80]} ({type(value).__name__})"


def _found(record: RawRecord) -> str:
    names = (str(name) if value is not None else f"{name} (empty)" for name, value in record.items())
    return f"columns found: {', '.join(names) or 'none'}"
