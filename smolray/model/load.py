"""Models and processors of the SmolVLM family (Idefics3, SmolVLM, SmolVLM2) from a hub id or a folder.

In: ModelConfig. Out: a transformers model with its parameters named by group, and a processor that needs no
torchvision. Safetensors only, remote code off, revision pinned where the config pins it.
"""

import logging
from typing import Any

import transformers
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel

from smolray.config import ModelConfig, ModelGroup
from smolray.data.processor import require_supported
from smolray.model import attention
from smolray.pretrained import DTYPES, resolve

transformers.utils.logging.disable_progress_bar()  # every worker would show one

# it warns at every call that int8 products have fp16 inputs
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def base_model(model: nn.Module) -> Any:
    """The transformers model inside a PeftModel, or the model itself.

    It does not import PEFT: every data task would have to.
    """
    inner = getattr(model, "get_base_model", None)
    return inner() if inner else model


def load_model(model: ModelConfig) -> PreTrainedModel:
    """The model in its training dtype, on the CPU. bitsandbytes decides where quantised weights are.

    Only the text model is quantised. The engine makes the fp32 masters of 16-bit training.

    Raises:
        ConfigError: the model is of another family.
    """
    require_supported(model)
    path = resolve(model.path)
    quantisation = None
    if model.load_in_4bit or model.load_in_8bit:
        quantisation = BitsAndBytesConfig(
            load_in_4bit=model.load_in_4bit,
            load_in_8bit=model.load_in_8bit,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPES[model.dtype],
            llm_int8_skip_modules=["lm_head", "model.connector", "model.vision_model"],
        )
    loaded = AutoModelForImageTextToText.from_pretrained(
        path,
        revision=model.revision,
        dtype=DTYPES[model.dtype],
        attn_implementation=model.attn_implementation,
        trust_remote_code=False,
        use_safetensors=True,
        quantization_config=quantisation,
    )

    # bitsandbytes would repack 4-bit weights on a CPU for inference; that rounds them, and they could not be trained on
    for module in loaded.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    loaded.config.use_cache = False
    loaded.set_attn_implementation({"text_config": attention.NAME})
    return loaded


def group_of(name: str) -> ModelGroup:
    """The group of a parameter or module by its Hugging Face name."""
    if ".vision_model." in f".{name}.":
        return "vision"
    return "connector" if ".connector." in f".{name}." else "text"


def freeze(model: nn.Module, train: tuple[ModelGroup, ...]) -> None:
    """Make the floating-point parameters of the groups in `train` trainable, and no others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(group_of(name) in train and parameter.is_floating_point())
