"""The tokenizer of a model, exactly as its tokenizer.json says.

In: a folder or hub id. Out: a fast tokenizer that gives the ids that the model was trained on.

transformers' AutoTokenizer chooses a class by the model's type. For Idefics3 that is GPT2Tokenizer, which puts its own
pre-tokenizer in place of the file's: digits after blank lines then become other tokens, without an error. So the file
is loaded as it is, and what the loaded tokenizer would save is compared with it.
"""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.utils import cached_file

from smolray.config import ConfigError

FILE = "tokenizer.json"
COMPARED = ("normalizer", "pre_tokenizer", "decoder")


def load_tokenizer(path: str, revision: str = "main") -> PreTrainedTokenizerFast:
    """The tokenizer in a folder or of a hub id.

    Raises:
        ConfigError: there is no tokenizer.json, or transformers loads another tokenizer from it than it describes.
    """
    file = cached_file(path, FILE, revision=revision, _raise_exceptions_for_missing_entries=False)
    if file is None:
        raise ConfigError(
            f"model.path = {path}: no {FILE} there; expected one, as every SmolVLM has it; "
            "nearest: save the tokenizer once with transformers' save_pretrained, which writes it"
        )

    tokenizer = PreTrainedTokenizerFast.from_pretrained(path, revision=revision, trust_remote_code=False)
    described = json.loads(Path(file).read_text(encoding="utf-8"))
    if wrong := differences(described, json.loads(tokenizer.backend_tokenizer.to_str())):
        raise ConfigError(
            f"model.path = {path}: the tokenizer that transformers loads is not the one that {FILE} describes: "
            f"{', '.join(wrong)} differ, so that texts would become other tokens than the model knows; "
            "compare tokenizer_config.json with the model's publisher, or download the folder again"
        )
    return tokenizer


def differences(described: dict[str, Any], loaded: dict[str, Any]) -> list[str]:
    """The parts of two tokenizer.json records that would give other ids or other text: their names.

    Tokens that the configuration adds behind the file's own are no difference.
    """
    wrong = [name for name in COMPARED if described.get(name) != loaded.get(name)]
    if _model(described) != _model(loaded):
        wrong.append("model")

    added = {token["content"]: token for token in loaded.get("added_tokens", [])}
    if any(added.get(token["content"]) != token for token in described.get("added_tokens", [])):
        wrong.append("added_tokens")
    return wrong


def _model(record: dict[str, Any]) -> tuple[Any, ...]:
    """What decides about ids: the kind, the vocabulary, and merges, which files spell "a b" or ["a", "b"]."""
    model = record.get("model") or {}
    merges = [
        tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model.get("merges", [])
    ]
    return model.get("type"), model.get("vocab"), merges, model.get("byte_fallback", False), model.get("unk_token")
