"""Small shards of real easy-vqa data, made without Ray, also as preference data and with captions."""

import random
from dataclasses import replace

from jobs.easyvqa import vqa_rows as vqa_rows
from smolray.data.sample import Conversation, Message, Part, ShardRow
from smolray.data.shards import write_shards as write_shards

ANSWERS = {
    "yes/no": ("yes", "no"),
    "shape": ("circle", "rectangle", "triangle"),
    "color": ("red", "green", "blue", "black", "gray", "teal", "brown", "yellow"),
}


def preference_rows(split: str, images: int) -> list[ShardRow]:
    """The questions of `vqa_rows` as preference data: rejected is a wrong answer of the same type, every third time in
    more words.
    """
    rng = random.Random(1)
    return [
        replace(row, conversations=tuple(_preference(c, rng) for c in row.conversations))
        for row in vqa_rows(split, images)
    ]


def caption(row: ShardRow) -> str | None:
    """ "a blue circle", where the questions about an image tell it."""
    colours, shapes = set(), set()
    for conversation in row.conversations:
        question, answer = (message.text for message in conversation.messages)
        words = set(question.rstrip("?").split())
        if answer not in ANSWERS["yes/no"] or (answer == "yes") != bool(words & {"not", "no"}):
            colours |= {answer, *words} & set(ANSWERS["color"])
            shapes |= {answer, *words} & set(ANSWERS["shape"])
    return f"a {colours.pop()} {shapes.pop()}" if len(colours) == len(shapes) == 1 else None


def captioned(rows: list[ShardRow]) -> list[ShardRow]:
    """The images with their captions in place of the questions."""
    found = []
    for row in rows:
        if text := caption(row):
            turns = (
                Message("user", (Part("image"), Part("text", "describe"))),
                Message("assistant", (Part("text", text),)),
            )
            found.append(replace(row, conversations=(Conversation(row.key, turns, answers=(text,)),)))
    return found


def _preference(conversation: Conversation, rng: random.Random) -> Conversation:
    question, right = conversation.messages
    wrong = rng.choice([a for a in ANSWERS[conversation.type] if a != right.text])
    wrong = f"it is {wrong} in the image" if rng.random() < 1 / 3 else wrong
    return replace(
        conversation, messages=(question,), chosen=(right,), rejected=(Message("assistant", (Part("text", wrong),)),)
    )
