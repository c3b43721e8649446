"""Where the planner finds a model: its config.json and tokenizer.json, or a published name. No weights are read.

In: ModelConfig. Out: ModelShape.

The marks of a tile (its row and column, the fake token, line breaks) are special tokens of most models, one token each.
SmolVLM-Instruct of 2024 (2.2B) has none for rows and columns: there they are plain text of ten tokens.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from smolray import storage
from smolray.config import ConfigError, ModelConfig
from smolray.config.model_folder import check_model_folder
from smolray.planner.shapes import ModelShape

NAMED = ("tiny", "random-256m", "random-500m", "random-2.2b")
MARKS_OF_PLAIN_TEXT = 10.0  # around a tile, counted as below with the tokenizer of SmolVLM-Instruct
# Parts of hub ids whose files need not be fetched: the random model of their shape, and what differs from it.
OF_2024: dict[str, Any] = {"tokens_around_tile": MARKS_OF_PLAIN_TEXT}
PUBLISHED: dict[str, tuple[str, int | None, dict[str, Any]]] = {
    "256m": ("random-256m", None, {}),
    "500m": ("random-500m", None, {}),
    "2.2b": ("random-2.2b", 49280, {}),  # SmolVLM2
    "smolvlm-instruct": ("random-2.2b", None, OF_2024),
    "smolvlm-base": ("random-2.2b", None, OF_2024),
    "smolvlm-synthetic": ("random-2.2b", None, OF_2024),
}
ROWS, COLUMNS = 3, 4  # of the image in which marks are counted: a photograph in 13 tiles


def shape_of(model: ModelConfig) -> ModelShape:
    """The shape of the run's model: from its files in a folder, in storage or in the hub's cache, or by name.

    Raises:
        ConfigError: its folder is damaged, it is of another family, or there is no config.json and its name is not
            known.
    """
    path = model.path
    if path in NAMED:
        return known_shape(path)
    if Path(path).expanduser().is_dir():
        check_model_folder(path, needs=())
    if config := _file(model, "config.json"):
        shape = ModelShape.from_config(json.loads(config), path)
        tokenizer = _file(model, "tokenizer.json")
        return replace(shape, tokens_around_tile=tokens_around_tile(tokenizer)) if tokenizer else shape
    for part, (name, vocab, differs) in PUBLISHED.items():
        if part in path.lower() and "smolvlm" in path.lower():
            return replace(known_shape(name, vocab), **differs)
    raise ConfigError(
        f"model.path = {path}: no config.json there or in the hub's cache, so its size is not known; expected a "
        f"folder, a model that was loaded here once, or one of {', '.join(NAMED)}"
    )


def known_shape(name: str, vocab: int | None = None) -> ModelShape:
    """A shape of smolray.model.tiny by name. `vocab`: another vocabulary; that of `tiny` is about 1000."""
    from smolray.model.tiny import SHAPES  # imports torch

    spec = SHAPES[name]
    text = {**spec["text"], "vocab_size": vocab or spec["vocab_size"] or 1000}
    config = {
        "model_type": "idefics3",
        "vision_config": spec["vision"],
        "text_config": text,
        "scale_factor": spec["scale_factor"],
        "tie_word_embeddings": bool(spec.get("tied")),
    }
    return ModelShape.from_config(config, name)


def tokens_around_tile(tokenizer_json: bytes) -> float:
    """Tokens of the marks around a tile: the mean of an image of 13 tiles (as Idefics3Processor marks them)."""
    fake = "<fake_token_around_image>"
    rows = (
        "".join(f"{fake}<row_{row}_col_{column}>" for column in range(1, COLUMNS + 1)) for row in range(1, ROWS + 1)
    )
    marks = "\n".join(rows) + f"\n\n{fake}<global-img>{fake}"
    ids = Tokenizer.from_buffer(tokenizer_json).encode(marks, add_special_tokens=False).ids
    return len(ids) / (ROWS * COLUMNS + 1)


def _file(model: ModelConfig, name: str) -> bytes | None:
    """A file of the model; None where it is not in the folder, in storage or in the hub's cache."""
    path = model.path
    if "://" in path or Path(path).expanduser().is_dir():
        where = storage.join(path if "://" in path else storage.absolute(path), name)
        return storage.read_bytes(where) if storage.exists(where) else None
    if "/" not in path:
        return None

    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(path, name, revision=model.revision)
    return Path(cached).read_bytes() if isinstance(cached, str) else None
