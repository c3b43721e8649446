"""The processor of a model: tokenizer, chat template and image settings, from its files and the run's settings."""

import json
from pathlib import Path
from typing import Any

from transformers import Idefics3Processor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from smolray.config import ConfigError, ModelConfig, RunConfig
from smolray.config.model_folder import TOKENIZER, check_model_folder
from smolray.data.tokenizer import load_tokenizer
from smolray.pretrained import model_config, reported, resolve

# A question about an image: what every chat template must render.
ASKED: Any = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]


def run_processor(config: RunConfig) -> Idefics3Processor:
    """The processor with the run's image settings.

    `image.upscale: false` is not among them: the processor has no setting that keeps small images small.
    """
    processor = load_processor(config.model)
    images = processor.image_processor
    if config.image.longest_edge is not None:
        images.size = {"longest_edge": config.image.longest_edge}
    if config.image.max_tiles == 1:
        images.size, images.do_image_splitting = {"longest_edge": images.max_image_size["longest_edge"]}, False
    return processor


def load_processor(model: ModelConfig) -> Idefics3Processor:
    """The processor with the PIL image backend, also for SmolVLM2, whose own processor requires a video backend.

    Raises:
        ConfigError: the model is of another family, its files are damaged, or its processor is not as SmolVLM's.
    """
    path, revision = resolve(model.path), model.revision or "main"
    check_model_folder(path, needs=(TOKENIZER,))
    config = model_config(model)
    with reported(model, "tokenizer and image settings"):
        tokenizer = load_tokenizer(path, revision)
        settings = _processor_settings(path, revision)
        image_processor = Idefics3ImageProcessorPil.from_pretrained(path, revision=revision)

    if {*image_processor.image_mean, *image_processor.image_std} != {0.5}:  # forward.patch_embeddings relies on it
        found = f"mean {image_processor.image_mean}, deviation {image_processor.image_std}"
        raise ConfigError(
            f"model.path = {model.path}: images are normalised with {found}; expected 0.5 for all, as SmolVLM has it"
        )

    template = tokenizer.chat_template or settings.get("chat_template") or _chat_template(path, revision)
    if not template:
        raise ConfigError(
            f"model.path = {model.path}: the processor has no chat template; expected chat_template.jinja or "
            "chat_template.json in the same folder"
        )

    with reported(model, "chat template"):
        processor = Idefics3Processor(
            image_processor,
            tokenizer,
            image_seq_len=settings.get("image_seq_len") or _image_seq_len(config),
            chat_template=template,
        )
        processor.apply_chat_template(ASKED, add_generation_prompt=True, tokenize=False)
    return processor


def _image_seq_len(config: Any) -> int:
    """Tokens of a tile, by the model's own shape (Idefics3Model.image_seq_len)."""
    return int((config.vision_config.image_size // config.vision_config.patch_size) ** 2 // config.scale_factor**2)


def _processor_settings(path: str, revision: str | None) -> dict[str, Any]:
    from transformers.utils import cached_file

    for name in ("processor_config.json", "preprocessor_config.json"):
        found = cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        if found:
            record: dict[str, Any] = json.loads(Path(found).read_text(encoding="utf-8"))
            if "image_seq_len" in record:
                return record
    return {}


def _chat_template(path: str, revision: str | None) -> str | None:
    from transformers.utils import cached_file

    for name in ("chat_template.jinja", "chat_template.json"):
        found = cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        if found:
            text = Path(found).read_text(encoding="utf-8")
            return json.loads(text)["chat_template"] if name.endswith(".json") else text
    return None
