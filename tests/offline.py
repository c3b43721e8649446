"""Models and data made on the spot: tiny models in a temp folder, images of any size and mode, conversations in one
line.

def test_x(tiny_path): ...   # import the fixtures:"""

import io
import random
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from smolray.config import DataConfig, ImageConfig, ModelConfig
from smolray.data.encode import Encoder
from smolray.data.processor import load_processor
from smolray.data.sample import Conversation, Message, Part, ShardRow, image_key

TEXTS = [
    "what shape is in the image? circle",
    "is there a red triangle in the picture? yes no",
    "what colour is it? blue green black",
    "does the first image hold the same thing as the second? it does",
    "Please describe both of them in a few words. A small grey box.",
]

WORDS = ["what", "is", "the", "red", "blue", "box", "?", "image", "of", "a", "Zebra,", "naïve", "—", "漢字", "🙂", "42"]


def untied(source: str | Path, folder: Path) -> Path:
    """The model of `source` with a head of its own, as published SmolVLMs have it, written to `folder`."""
    model = AutoModelForImageTextToText.from_pretrained(source)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().roll(1, 0))
    model.save_pretrained(folder)
    load_processor(ModelConfig(path=str(source))).save_pretrained(folder)
    return folder


def encoder_of(processor, image: dict | None = None, **data) -> Encoder:
    return Encoder(processor, DataConfig(**data), ImageConfig(**image or {}))


@lru_cache(maxsize=16)
def drawing(width: int, height: int, seed: int) -> Image.Image:
    """Smooth colours and some noise, so that scaling matters and no two seeds look alike."""
    rng = np.random.default_rng(seed)
    x, y = np.linspace(0, 1, width), np.linspace(0, 1, height)[:, None]
    waves = [np.sin((i + 1) * 3 * x + rng.random() * 6) * np.cos((i + 1) * 2 * y + rng.random() * 6) for i in range(3)]
    values = np.stack(waves, -1) * 100 + 128 + rng.normal(0, 12, (height, width, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


@lru_cache(maxsize=32)
def picture(width: int, height: int, seed: int = 0, mode: str = "RGB", form: str = "PNG", **options) -> bytes:
    """A drawing in a file's format; `options` are those of Pillow's save."""
    sink = io.BytesIO()
    drawing(width, height, seed).convert(mode).save(sink, form, **options)
    return sink.getvalue()


def message(role: str, *parts: str | None) -> Message:
    """A message of texts and images; None stands for an image."""
    return Message(role, tuple(Part("image") if p is None else Part("text", p) for p in parts))


def asked(question: str, answer: str, images: int = 1, name: str = "") -> Conversation:
    turns = (message("user", *[None] * images, question), message("assistant", answer))
    return Conversation(name or f"{question}/{answer}", turns, answers=(answer,))


def shard_row(images: list[bytes], *conversations: Conversation) -> ShardRow:
    return ShardRow(image_key(images, conversations[0]), tuple(images), conversations)


def hf_messages(conversation: Conversation) -> list[dict]:
    """The same turns as the chat template takes them."""
    return [
        {
            "role": m.role,
            "content": [{"type": p.type} | ({"text": p.text} if p.type == "text" else {}) for p in m.content],
        }
        for m in conversation.messages
    ]


def words(rng: random.Random, most: int = 8) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))


def files_under(folder: str | Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())
