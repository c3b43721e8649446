"""Turns of a conversation from raw values: the messages of TRL, OpenAI and Qwen, LLaVA's and ShareGPT's turns, texts.

In: values of a record. Out: Message tuples and the image values found inside them, or a SampleError.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from smolray.data.formats.image_columns import image_kind
from smolray.data.formats.markers import Place
from smolray.data.formats.values import is_missing, list_of, shown, text_of
from smolray.data.sample import ROLES, Conversation, Message, Part, SampleError

MAX_TEXT = 16 * 2**20  # characters in a row; a longer row is a mistake, and a batch of such rows fills the memory

ROLE_KEYS, CONTENT_KEYS = ("role", "from", "speaker"), ("content", "value", "text")
ROLE_NAMES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt", "ai", "chatbot"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython", "tool_call", "tool_response")
TRAINED_KEYS = ("weight", "train", "loss")
IMAGE_KEYS = ("image", "image_url", "path", "url", "bytes", "source")
_PATH_IN_TEXT = re.compile(r"<img>\s*([^<>\n]{1,1024}?)\s*</img>", re.IGNORECASE)  # Qwen-VL

Messages = tuple[tuple[Message, ...], list[Any]]  # turns, image values found inside their parts in order


def read_messages(value: Any, name: str) -> Messages:
    """Turns and the image values found inside their parts.

    A turn is {role, content} or {from, value}. Content is a string or a list of parts {type: text, text},
    {type: image[, image | path | url]}, {type: image_url, image_url}. A turn with `weight: 0`, `train: false` or
    `loss: false` is not trained. A system turn without content is left out. Raises SampleError (wrong_type,
    wrong_role, empty_turn).
    """
    messages: list[Message] = []
    embedded: list[Any] = []
    single = isinstance(value, Mapping) and isinstance(value.get(_key(value, ROLE_KEYS)), str)
    for turn in [value] if single else list_of(value, name):
        role_key, content_key = (_key(turn, keys) for keys in (ROLE_KEYS, CONTENT_KEYS))
        if not role_key or not content_key:
            raise SampleError(
                "wrong_type", f"a turn of {name} is {shown(turn)}; expected {{role, content}} or {{from, value}}"
            )

        role, content = role_of(turn[role_key]), turn[content_key]
        if content is None or content == []:
            if role == "system":
                continue
            raise SampleError("empty_answer" if role == "assistant" else "empty_turn", f"the {role} turn holds nothing")
        parts = list(_content(content, name, role))
        embedded += [image for _, image in parts if image is not None]
        messages.append(Message(role, tuple(part for part, _ in parts), _is_trained(turn, role)))
    return tuple(messages), embedded


def _key(turn: Any, keys: tuple[str, ...]) -> str:
    """The first of `keys` that a turn has, with a value where possible; empty where it has none."""
    present = [key for key in keys if key in turn] if isinstance(turn, Mapping) else []
    return next((key for key in present if turn[key] is not None), present[0] if present else "")


def _content(content: Any, name: str, role: str) -> Iterator[tuple[Part, Any]]:
    """Parts, each with the image value inside it, or None."""
    if isinstance(content, Mapping) and "type" in content:
        content = [content]
    values = [content] if isinstance(content, str | int | float) else list_of(content, f"the content of a {role} turn")
    for value in values:
        if isinstance(value, str):
            yield from _text(value, role)
        elif isinstance(value, int | float):
            yield Part("text", text_of(value, f"the content of a {role} turn")), None
        else:
            yield from _part(value, role)


def _part(value: Any, role: str) -> Iterator[tuple[Part, Any]]:
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind is None and isinstance(value, Mapping):  # Qwen-VL: {image: path} and {text}
        kind = next((k for k in ("image", "image_url", "text") if not is_missing(value.get(k))), None)

    if kind in ("text", "input_text"):
        text = next((value[k] for k in CONTENT_KEYS[::-1] if value.get(k) is not None), None)
        yield from _text(text_of(text, "the text of a part"), role)
    elif kind in ("image", "image_url", "input_image"):
        image, index = _image_of(value), value.get("index")
        # TRL's {type: image, index} says which image of the row.
        numbered = isinstance(index, int) and image is None
        place = Place("image", number=index + 1) if numbered else Part("image")
        yield place, image
    else:
        raise SampleError("wrong_type", f"a part of a message is {shown(value)}; expected type text or image")


def _image_of(part: Mapping[str, Any]) -> Any:
    """The image value inside a part; None where the part is the place of an image of the row."""
    value = next((part[key] for key in IMAGE_KEYS if part.get(key) is not None), None)
    if isinstance(value, Mapping) and isinstance(value.get("url"), str):
        return value["url"]
    if isinstance(value, Mapping) and isinstance(value.get("data"), str):  # {type: base64, media_type, data}
        return f"data:{value.get('media_type') or 'image/png'};base64,{value['data']}"
    return value


def _text(text: str, role: str) -> Iterator[tuple[Part, Any]]:
    """A text as parts: `<img>path</img>` in it is an image."""
    if role == "assistant" or "</img>" not in text.lower():
        yield Part("text", text), None
        return
    pieces = _PATH_IN_TEXT.split(text)
    if not all(map(image_kind, pieces[1::2])):
        yield Part("text", text), None
        return
    for number, piece in enumerate(pieces):
        if number % 2:
            yield Part("image"), piece
        elif piece:
            yield Part("text", piece), None


def _is_trained(turn: Mapping[str, Any], role: str) -> bool:
    """Whether the loss counts an assistant turn: not where its weight is 0, or train or loss is false."""
    if role != "assistant":
        return True
    marks = {key: turn[key] for key in TRAINED_KEYS if not is_missing(turn.get(key))}
    if wrong := {key: mark for key, mark in marks.items() if mark not in (0, 1)}:
        raise SampleError("wrong_type", f"a turn has {shown(wrong)}; expected 0 or 1, true or false")
    return all(marks.values())


def user_turn(text: str) -> Message:
    """A message of the user."""
    return Message("user", (Part("text", text),))


def assistant_turn(text: str) -> Message:
    """A message of the assistant."""
    return Message("assistant", (Part("text", text),))


def system_turn(text: str) -> Message:
    """A message of the system."""
    return Message("system", (Part("text", text),))


def role_of(value: Any) -> str:
    """The role that a name in any case stands for. Raises SampleError."""
    name = value.strip().lower() if isinstance(value, str) else ""
    if name in TOOL_ROLES:
        raise SampleError("wrong_role", f"role {value!r}: turns of tools are not supported; leave such rows out")
    if name not in ROLE_NAMES:
        raise SampleError(
            "wrong_role",
            f"role {shown(value)}; expected {', '.join(ROLES)} or a usual name for one, such as human, gpt",
        )
    return ROLE_NAMES[name]


def check_text(conversation: Conversation) -> None:
    """Raise SampleError where the text is too long or is not Unicode."""
    size = sum(len(m.text) for m in (*conversation.messages, *conversation.chosen, *conversation.rejected))
    if size > MAX_TEXT:
        raise SampleError("text_too_long", f"the row holds {size} characters; the limit is {MAX_TEXT}")
    try:
        conversation.to_json().encode()
    except UnicodeEncodeError as error:
        raise SampleError(
            "bad_text", f"the text holds {error.object[error.start : error.end]!r}, which is not Unicode text"
        ) from error
