"""Which models smolray trains, told by their config.json: the SmolVLM family.

In: the content of a config.json. Out: nothing, or a message that says what was found.
"""

from collections.abc import Mapping
from typing import Any

from smolray.config.errors import ConfigError

MODEL_TYPES = ("idefics3", "smolvlm")
ARCHITECTURES = ("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration")
# model/forward.py runs the layers of this one itself; others scale embeddings, attention, residuals or logits
TEXT_MODEL_TYPE = "llama"


def require_family(path: str, config: Mapping[str, Any]) -> None:
    """Raise ConfigError unless `config`, the config.json of the model at `path`, is of the SmolVLM family."""
    kind, text, vision = config.get("model_type"), config.get("text_config"), config.get("vision_config")
    if kind not in MODEL_TYPES:
        raise ConfigError(
            f"model.path = {path}: model type {kind!r}; expected {' or '.join(MODEL_TYPES)}, as every SmolVLM has it"
        )
    if others := sorted({*(config.get("architectures") or ())} - {*ARCHITECTURES}):
        raise ConfigError(
            f"model.path = {path}: architecture {', '.join(others)}; expected {' or '.join(ARCHITECTURES)}: another "
            "one has other weights, so that some of the model's would be random; nearest: the SmolVLM it was made from"
        )
    if not isinstance(text, Mapping) or not isinstance(vision, Mapping):
        raise ConfigError(
            f"model.path = {path}: config.json has no text_config or no vision_config; expected both, as every SmolVLM "
            "has them"
        )

    found = text.get("model_type", TEXT_MODEL_TYPE)
    if found != TEXT_MODEL_TYPE:
        raise ConfigError(
            f"model.path = {path}: its text model is of type {found!r}; expected {TEXT_MODEL_TYPE!r}, as every SmolVLM "
            "has it: smolray runs the text layers itself and knows no other kind, so that the losses would be wrong; "
            "nearest: a SmolVLM of the same size"
        )
