"""Models and processors of the SmolVLM family (Idefics3, SmolVLM, SmolVLM2) from a hub id or a folder.

In: ModelConfig. Out: a transformers model with its parameters named by group, and a processor that needs no
torchvision. Safetensors only, remote code off, revision pinned where the config pins it.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel

from smolray.config import ConfigError, ModelConfig, ModelGroup
from smolray.config.model_folder import check_model_folder
from smolray.model import attention
from smolray.pretrained import DTYPES, model_config, reported, resolve, stored_shapes, tensor_files

transformers.utils.logging.disable_progress_bar()  # every worker would show one

# what it says about missing weights is an error of ours (refuse_other_weights)
logging.getLogger("transformers.modeling_utils").addFilter(lambda record: "LOAD REPORT" not in record.getMessage())

# it warns at every call that int8 products have fp16 inputs
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

SHOWN_NAMES = 5
UNQUANTISED = ("lm_head", "model.connector", "model.vision_model")  # modules that stay as they are in 4 and 8 bit


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
        ConfigError: the model is of another family, its folder is damaged, or weights are missing, of another shape or
            too many.
    """
    path = resolve(model.path)
    check_model_folder(path)
    model_config(model)
    torch.backends.cuda.enable_cudnn_sdp(model.cudnn_attention)
    quantisation = None
    if model.load_in_4bit or model.load_in_8bit:
        quantisation = BitsAndBytesConfig(
            load_in_4bit=model.load_in_4bit,
            load_in_8bit=model.load_in_8bit,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPES[model.dtype],
            llm_int8_threshold=model.llm_int8_threshold,
            llm_int8_skip_modules=list(UNQUANTISED),
        )
    with reported(model, "weights"):
        made: Any = AutoModelForImageTextToText.from_pretrained(
            path,
            revision=model.revision,
            dtype=DTYPES[model.dtype],
            attn_implementation=model.attn_implementation,
            trust_remote_code=False,
            use_safetensors=True,
            quantization_config=quantisation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, with those that are missing
        )
    loaded, info = made
    refuse_other_weights(model, info)

    # bitsandbytes would repack 4-bit weights on a CPU for inference; that rounds them, and they could not be trained on
    for module in loaded.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    loaded.config.use_cache = False
    loaded.set_attn_implementation({"text_config": attention.NAME})
    return loaded


def check_weights(model: ModelConfig) -> None:
    """Refuse a local folder without exactly the model's weights, from the headers of its files, before a run starts.

    A folder whose tensors have other names than the model's parameters is read whole. Raises ConfigError.
    """
    path = resolve(model.path)
    if not Path(path).is_dir():
        return
    check_model_folder(path)
    empty = empty_model(model)
    tied = getattr(empty, "_tied_weights_keys", None) or ()
    stored = stored_shapes(tensor_files(path))
    wanted = {name: tuple(p.shape) for name, p in empty.named_parameters()}
    if {name: shape for name, shape in stored.items() if name in wanted or name not in tied} != wanted:
        load_model(model)


def empty_model(model: ModelConfig) -> PreTrainedModel:
    """The model of `load_model` without weights: parameters on the meta device, tied as in the loaded model."""
    config = model_config(model)
    torch.backends.cuda.enable_cudnn_sdp(model.cudnn_attention)
    with torch.device("meta"):
        made = AutoModelForImageTextToText.from_config(
            config, dtype=DTYPES[model.dtype], attn_implementation=model.attn_implementation
        )

    text = made.model.text_model
    text.rotary_emb = type(text.rotary_emb)(config=text.config)  # its frequencies are computed, not read
    made.config.use_cache = False
    made.set_attn_implementation({"text_config": attention.NAME})
    return made


def refuse_other_weights(model: ModelConfig, info: Mapping[str, Any]) -> None:
    """Raise ConfigError where the files do not hold exactly the model's weights.

    transformers would fill those that are missing at random. `info`: its `output_loading_info`, which leaves out tied
    weights and optional buffers.
    """
    faults = {
        "missing": sorted(info["missing_keys"]),
        "not of this model": sorted(info["unexpected_keys"]),
        "of another shape": [
            f"{name} ({tuple(found)}, expected {tuple(expected)})"
            for name, found, expected in sorted(info["mismatched_keys"])
        ],
    }
    words = [_names(what, names) for what, names in faults.items() if names]
    if words:
        raise ConfigError(
            f"model.path = {model.path}: {'; '.join(words)}; expected the weights that its config.json describes: "
            "download or export the folder again"
        )


def _names(what: str, names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return f"{len(names)} weights are {what}: {', '.join(names[:SHOWN_NAMES])}{more}"


def group_of(name: str) -> ModelGroup:
    """The group of a parameter or module by its Hugging Face name."""
    if ".vision_model." in f".{name}.":
        return "vision"
    return "connector" if ".connector." in f".{name}." else "text"


def freeze(model: nn.Module, train: tuple[ModelGroup, ...]) -> None:
    """Make the floating-point parameters of the groups in `train` trainable, and no others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(group_of(name) in train and parameter.is_floating_point())
