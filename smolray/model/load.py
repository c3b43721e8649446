"""Models and processors of the SmolVLM family (Idefics3, SmolVLM, SmolVLM2) from a hub id or a folder.

In: ModelConfig. Out: a transformers model with its parameters named by group, and a processor that needs no torchvision.
Safetensors only, remote code off, revision pinned where the config pins it.
"""

import hashlib
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, BitsAndBytesConfig, Idefics3Processor, PreTrainedModel
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from smolray import storage
from smolray.config import ConfigError, Group, ModelConfig
from smolray.model import attention

transformers.utils.logging.disable_progress_bar()  # a bar for each worker tells nobody anything

logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # says at every call that int8 products are of fp16 inputs

MODEL_TYPES = ("idefics3", "smolvlm")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def base_model(model: nn.Module) -> Any:
    """The transformers model inside a PeftModel, or the model itself. Here and without PEFT, which every data task would have to import."""
    inner = getattr(model, "get_base_model", None)
    return inner() if inner else model


def resolve(path: str) -> str:
    """A local folder or hub id for `path`; a folder in object storage is copied to this node once."""
    if storage.is_local(path) or "://" not in path:
        return storage.absolute(path) if Path(path).expanduser().is_dir() else path
    files = storage.list_files(path)
    identity = repr([path, *((f.base_name, f.size, f.mtime_ns) for f in files)])
    target = Path(tempfile.gettempdir()) / "smolray-models" / hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
    if not files:
        raise ConfigError(f"model.path = {path}: no files there")
    for info in files:
        if not (copy := target / info.base_name).exists() or copy.stat().st_size != info.size:
            storage.write_bytes(str(copy), storage.read_bytes(storage.join(path, info.base_name)))
    return str(target)


def load_processor(model: ModelConfig) -> Idefics3Processor:
    """The processor with the PIL image backend; for images of SmolVLM2 too, whose own processor wants a video backend."""
    path, revision = resolve(model.path), model.revision or "main"
    tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    settings = _processor_settings(path, revision)
    image_processor = Idefics3ImageProcessorPil.from_pretrained(path, revision=revision)
    if {*image_processor.image_mean, *image_processor.image_std} != {0.5}:  # what forward.patch_embeddings undoes
        found = f"mean {image_processor.image_mean}, deviation {image_processor.image_std}"
        raise ConfigError(f"model.path = {model.path}: images are normalised with {found}; expected 0.5 for all, as SmolVLM has it")
    template = tokenizer.chat_template or settings.get("chat_template") or _chat_template(path, revision)
    if not template:
        raise ConfigError(f"model.path = {model.path}: the processor has no chat template; expected chat_template.jinja or .json beside it")
    return Idefics3Processor(image_processor, tokenizer, image_seq_len=settings.get("image_seq_len") or _image_seq_len(path, revision), chat_template=template)


def load_model(model: ModelConfig) -> PreTrainedModel:
    """The model in its training dtype, on the CPU (quantised weights, those of the text model: where bitsandbytes puts them).

    fp32 masters of 16-bit training belong to the engine. Raises ConfigError for a model of another family.
    """
    path = resolve(model.path)
    kind = AutoConfig.from_pretrained(path, revision=model.revision, trust_remote_code=False).model_type
    if kind not in MODEL_TYPES:
        raise ConfigError(f"model.path = {model.path}: model type {kind!r}; expected one of {', '.join(MODEL_TYPES)}")
    quantisation = None
    if model.load_in_4bit or model.load_in_8bit:
        quantisation = BitsAndBytesConfig(
            load_in_4bit=model.load_in_4bit, load_in_8bit=model.load_in_8bit, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPES[model.dtype], llm_int8_skip_modules=["lm_head", "model.connector", "model.vision_model"],
        )  # fmt: skip
    loaded = AutoModelForImageTextToText.from_pretrained(
        path, revision=model.revision, dtype=DTYPES[model.dtype], attn_implementation=model.attn_implementation, trust_remote_code=False,
        use_safetensors=True, quantization_config=quantisation,
    )  # fmt: skip
    for module in loaded.modules():  # bitsandbytes would repack 4-bit weights on a CPU for inference, with rounding, and training could not go on
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    loaded.config.use_cache = False
    loaded.set_attn_implementation({"text_config": attention.NAME})
    return loaded


def group_of(name: str) -> Group:
    """The group of a parameter or module by its Hugging Face name."""
    if ".vision_model." in f".{name}.":
        return "vision"
    return "connector" if ".connector." in f".{name}." else "text"


def freeze(model: nn.Module, train: tuple[Group, ...]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(group_of(name) in train and parameter.is_floating_point())


def _image_seq_len(path: str, revision: str | None) -> int:
    """Tokens of a tile, by the model's own shape (Idefics3Model.image_seq_len)."""
    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
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
