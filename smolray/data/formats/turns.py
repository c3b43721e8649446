"""Messages of a conversation from raw values: TRL's messages, plain texts, and the places of their images.

In: values of a record. Out: Message tuples, or a SampleError.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from smolray.data.formats.values import list_of, shown, text_of
from smolray.data.sample import ROLES, Conversation, Message, Part, SampleError

MAX_TEXT = 16 * 2**20  # characters in a row; a longer row is a mistake, and a batch of such rows fills the memory


def read_messages(value: Any, name: str) -> tuple[tuple[Message, ...], list[Any]]:
    """TRL messages and the image values found inside their parts.

    Content is a string or a list of parts {type: text, text} / {type: image[, image]}. Raises SampleError (wrong_type,
    wrong_role).
    """
    messages: list[Message] = []
    embedded: list[Any] = []
    for message in list_of(value, name):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise SampleError("wrong_type", f"a message of {name} is {shown(message)}; expected {{role, content}}")

        content = message["content"]
        values = [content] if isinstance(content, str) else list_of(content, f"the content of a message of {name}")
        parts = tuple(_part(part) for part in values)
        embedded += [v["image"] for v in values if isinstance(v, Mapping) and _is_embedded(v)]
        messages.append(Message(role_of(message["role"]), parts))
    return tuple(messages), embedded


def _part(value: Any) -> Part:
    if isinstance(value, str):
        return Part("text", value)
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "text":
        return Part("text", text_of(value.get("text"), "the text of a part"))
    if kind == "image":
        return Part("image")
    raise SampleError("wrong_type", f"a part of a message is {shown(value)}; expected type text or image")


def _is_embedded(part: Mapping[str, Any]) -> bool:
    """Whether the part contains its image. Otherwise it is the place of an image of the row."""
    return part.get("type") == "image" and part.get("image") is not None


def user_turn(text: str) -> Message:
    """A message of the user."""
    return Message("user", (Part("text", text),))


def assistant_turn(text: str) -> Message:
    """A message of the assistant."""
    return Message("assistant", (Part("text", text),))


def role_of(value: Any) -> str:
    """The role itself if it is one. Raises SampleError."""
    if value not in ROLES:
        raise SampleError("wrong_role", f"role {shown(value)}; expected {', '.join(ROLES)} (or LLaVA's human, gpt)")
    return value


def place_images(messages: tuple[Message, ...], images: int) -> tuple[Message, ...]:
    """Put the row's images first into the first user turn, unless the messages place images themselves."""
    if not images or any(p.type == "image" for m in messages for p in m.content):
        return messages
    for number, message in enumerate(messages):
        if message.role == "user":
            with_images = replace(message, content=(Part("image"),) * images + message.content)
            return (*messages[:number], with_images, *messages[number + 1 :])

    raise SampleError("no_turn", "the row has an image and no user turn to place it in")


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
