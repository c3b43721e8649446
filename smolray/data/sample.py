"""The one shape of training data: a Sample is an ordered set of encoded images and one conversation about them.

In: whatever the parsers read. Out: `Sample`, and `ShardRow`, which gathers all the conversations about the same images.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

ROLES: tuple[str, ...] = ("system", "user", "assistant")


class SampleError(ValueError):
    """One row of the source cannot become a sample; the message says why. `reason` is its class, for the summary."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Part:
    """A piece of a message: some text, or the place of the next image."""

    type: Literal["text", "image"]
    text: str = ""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. `trained`: of an assistant turn, whether the loss counts it."""

    role: str
    content: tuple[Part, ...]
    trained: bool = True

    @property
    def text(self) -> str:
        return "".join(p.text for p in self.content)


@dataclass(frozen=True)
class Conversation:
    """Turns about the images of a sample.

    SFT: `messages` holds all turns. Preference data: `messages` is the prompt, `chosen` and `rejected` are its two
    endings. `answers` are all the reference answers (VQAv2 has ten), `type` a label for tables such as "yes/no",
    `source` the number of its source where the data have several.
    """

    id: str
    messages: tuple[Message, ...]
    chosen: tuple[Message, ...] = ()
    rejected: tuple[Message, ...] = ()
    type: str = ""
    answers: tuple[str, ...] = ()
    source: int = 0

    @property
    def is_preference(self) -> bool:
        return bool(self.chosen)

    def to_json(self) -> str:
        record: dict[str, Any] = {"id": self.id, "messages": [_message_to_dict(m) for m in self.messages]}
        if self.is_preference:
            record["chosen"] = [_message_to_dict(m) for m in self.chosen]
            record["rejected"] = [_message_to_dict(m) for m in self.rejected]
        if self.type:
            record["type"] = self.type
        if self.answers:
            record["answers"] = list(self.answers)
        if self.source:
            record["source"] = self.source
        return json.dumps(record, ensure_ascii=False, separators=(",", ":"))

    @property
    def content(self) -> str:
        """What it says: its record without its id and source."""
        return replace(self, id="", source=0).to_json()

    @classmethod
    def from_json(cls, text: str) -> "Conversation":
        record = json.loads(text)
        return cls(
            id=record["id"],
            messages=_messages_from(record["messages"]),
            chosen=_messages_from(record.get("chosen", [])),
            rejected=_messages_from(record.get("rejected", [])),
            type=record.get("type", ""),
            answers=tuple(record.get("answers", ())),
            source=record.get("source", 0),
        )


@dataclass(frozen=True)
class Sample:
    """One source row: `images` are encoded files (PNG, JPEG …) in the order in which the messages place them."""

    images: tuple[bytes, ...]
    conversation: Conversation


@dataclass(frozen=True)
class ShardRow:
    """All conversations about one ordered set of images; text-only samples stay single."""

    key: str
    images: tuple[bytes, ...]
    conversations: tuple[Conversation, ...]


def image_key(images: Sequence[bytes], conversation: Conversation) -> str:
    """What rows are gathered by: a hash of the ordered image hashes, or of the conversation where there is no image."""
    return key_of(image_digests(images), conversation)


def image_digests(images: Sequence[bytes]) -> list[bytes]:
    """What identifies each image: a hash of its bytes."""
    return [hashlib.blake2b(image, digest_size=16).digest() for image in images]


def key_of(digests: Sequence[bytes], conversation: Conversation) -> str:
    """`image_key` of images with these digests."""
    digest = hashlib.blake2b(digest_size=16)
    if not digests:
        digest.update(b"text" + conversation.to_json().encode())
    for image in digests:
        digest.update(image)
    return digest.hexdigest()


def check_sample(sample: Sample) -> None:
    """Raise SampleError unless the sample has a turn to learn from and places exactly its images."""
    conversation = sample.conversation
    branches = [conversation.chosen, conversation.rejected] if conversation.is_preference else [conversation.messages]
    if not conversation.messages:
        raise SampleError("no_turn", "the conversation has no turn")

    for branch in branches:
        if not any(m.role == "assistant" for m in branch):
            raise SampleError("no_turn", "no assistant turn to learn from")
        if not any(m.role == "assistant" and m.trained for m in branch):
            raise SampleError("no_turn", "every assistant turn says that it is not to be trained")
        for message in branch:
            if message.role == "assistant" and not message.text.strip():
                raise SampleError("empty_answer", "an assistant turn is empty")
    for message in (*conversation.messages, *conversation.chosen, *conversation.rejected):
        if message.role not in ROLES:
            raise SampleError("wrong_role", f"role {message.role!r} is not one of {', '.join(ROLES)}")

    placed = sum(p.type == "image" for m in conversation.messages for p in m.content)
    if any(p.type == "image" for m in (*conversation.chosen, *conversation.rejected) for p in m.content):
        raise SampleError("image_in_answer", "chosen and rejected may not place images; put them in the prompt")
    if placed != len(sample.images):
        raise SampleError("image_count", f"the messages place {placed} images, the row has {len(sample.images)}")


def _message_to_dict(message: Message) -> dict[str, Any]:
    content = [{"type": "image"} if p.type == "image" else {"type": "text", "text": p.text} for p in message.content]
    return {"role": message.role, "content": content} | ({} if message.trained else {"trained": False})


def _messages_from(records: list[dict[str, Any]]) -> tuple[Message, ...]:
    return tuple(
        Message(r["role"], tuple(Part(p["type"], p.get("text", "")) for p in r["content"]), r.get("trained", True))
        for r in records
    )
