"""Markers such as `<image>`, `<image_1>` or `<|image|>` in the text of turns -> places of the row's images.

In: the turns of a conversation and how many images its row has. Out: turns with each image in its place, and which
image of the row stands in each.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from smolray.data.sample import Message, Part, SampleError

_CORE = (
    r"<image(?:[ _-]?(\d{1,3}))?>|<\|image(?:_?pad)?(?:[ _-]?(\d{1,3}))?\|>|<image_?(?:here|placeholder|token|pad)>"
    r"|<start_of_image>"
)
_WRAPPED = rf"<img>\s*(?:{_CORE})\s*</img>|<image>\s*(?:\./)?\s*</image>|<\|vision_start\|>(?:{_CORE})<\|vision_end\|>"
# The line break next to a marker belongs to the notation.
_MARKER = re.compile(rf"\n?(?:{_WRAPPED}|{_CORE})\n?", re.IGNORECASE)
_TAG = re.compile(r"\n?<img(?:[ _-]?(\d{1,3}))?>(?:</img>)?\n?", re.IGNORECASE)  # HTML has it too
_ALONE = re.compile(rf"^[ \t]*(?:{_WRAPPED}|{_CORE})|(?:{_WRAPPED}|{_CORE})[ \t]*$", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Place(Part):
    """The place of an image that names its number in the row; -1: the next one."""

    number: int = -1


@dataclass(frozen=True)
class Placed:
    """Turns with all images in their places. `order`: which image of the row stands in each place."""

    messages: tuple[Message, ...]
    order: tuple[int, ...]


def place_images(messages: Sequence[Message], images: int, expected: bool = False) -> Placed:
    """Put the row's images where the turns say.

    That is at parts of type image, at markers in user and system turns, else first in the first user turn.

    `expected`: the row should have images, so a marker without any is a fault, not text. Raises SampleError
    (image_count, no_turn).
    """
    messages = tuple(messages)
    parts = sum(p.type == "image" for m in messages for p in m.content)
    marked, markers = _marked(messages, _MARKER)
    if images and not markers:
        marked, markers = _marked(messages, _TAG)

    if markers and not images and not parts:
        if expected or any(_ALONE.search(p.text) for m in messages if m.role != "assistant" for p in m.content):
            raise SampleError("image_count", f"the text has {markers} markers of images, the row has 0 images")
        return Placed(messages, ())  # a literal marker of a text-only row
    if markers and parts != images:
        return _resolved(marked, images)
    if parts:
        return _resolved(messages, images)
    return Placed(_first(messages, images), tuple(range(images))) if images else Placed(messages, ())


def _marked(messages: tuple[Message, ...], marker: re.Pattern[str]) -> tuple[tuple[Message, ...], int]:
    """Turns with their markers as parts, and how many there are. The markers of the assistant are text."""
    marked, count = [], 0
    for message in messages:
        if message.role != "assistant":
            content = tuple(part for p in message.content for part in _parts(p, marker))
            count += sum(p.type == "image" for p in content) - sum(p.type == "image" for p in message.content)
            message = replace(message, content=content)
        marked.append(message)
    return tuple(marked), count


def _parts(part: Part, marker: re.Pattern[str]) -> Iterator[Part]:
    if part.type != "text" or not marker.search(part.text):
        yield part
        return
    position = 0
    for match in marker.finditer(part.text):
        if match.start() > position:
            yield Part("text", part.text[position : match.start()])
        number = next((int(n) for n in match.groups() if n), None)
        yield Part("image") if number is None else Place("image", number=number)
        position = match.end()
    if position < len(part.text):
        yield Part("text", part.text[position:])


def _resolved(messages: tuple[Message, ...], images: int) -> Placed:
    """Each place with its image. Raises SampleError (image_count) unless the places take every image of the row."""
    places = [p for m in messages for p in m.content if p.type == "image"]
    numbers = [p.number for p in places if isinstance(p, Place)]
    if numbers and len(numbers) < len(places):
        raise SampleError("image_count", f"{len(numbers)} of the {len(places)} markers of images have a number")
    if numbers:
        first = 0 if 0 in numbers else 1
        order = tuple(n - first for n in numbers)
        if set(order) != set(range(images)):
            named = ", ".join(map(str, sorted(set(numbers))))
            raise SampleError("image_count", f"the markers name the images {named}, the row has {images}")
    else:
        order = tuple(range(images))
        if len(places) != images:
            raise SampleError("image_count", f"the messages place {len(places)} images, the row has {images}")

    return Placed(tuple(replace(m, content=tuple(map(_plain, m.content))) for m in messages), order)


def _plain(part: Part) -> Part:
    return Part("image") if part.type == "image" else part


def _first(messages: tuple[Message, ...], images: int) -> tuple[Message, ...]:
    for number, message in enumerate(messages):
        if message.role == "user":
            with_images = replace(message, content=(Part("image"),) * images + message.content)
            return (*messages[:number], with_images, *messages[number + 1 :])
    raise SampleError("no_turn", "the row has an image and no user turn to place it in")
