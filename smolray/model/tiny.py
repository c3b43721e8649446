"""Models without a hub.

An Idefics3 of about 0.4 M parameters that learns, one of 30 M, and random ones with the exact shapes of SmolVLM.

In: the name of a shape, and text to train a tokenizer on. Out: a folder that `from_pretrained` loads, with processor
and chat template.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor, PreTrainedTokenizerFast
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

# SmolVLM's own template (HuggingFaceTB/SmolVLM-256M-Instruct, chat_template.json).
CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}"
    "{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
SPECIAL_TOKENS = [
    "<|im_start|>",
    "<|im_end|>",
    "<end_of_utterance>",
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
]
ROW_COL_TOKENS = [f"<row_{r + 1}_col_{c + 1}>" for r in range(6) for c in range(6)]

_SIGLIP_BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 512,
    "patch_size": 16,
}
_SIGLIP_SO = {
    "hidden_size": 1152,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "intermediate_size": 4304,
    "image_size": 384,
    "patch_size": 14,
}


def _text(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
    }


# vision, text, pixel-shuffle factor, vocabulary, longest edge (the published configs of SmolVLM-256M / 500M / Instruct)
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vision": {
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 192,
            "image_size": 64,
            "patch_size": 8,
        },
        "text": _text(96, 3, 4, 2, 256),
        "scale_factor": 2,
        "vocab_size": None,
        "longest_edge": 64,
        "tied": True,
        "initializer_range": 0.1,
    },
    "random-30m": {  # for benchmarks on a CPU: SmolVLM's vocabulary and tokens of a tile, everything else small
        "vision": {
            "hidden_size": 256,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "intermediate_size": 1024,
            "image_size": 256,
            "patch_size": 16,
        },
        "text": _text(256, 8, 4, 4, 1024),
        "scale_factor": 2,
        "vocab_size": 49280,
        "longest_edge": 256,
        "tied": True,
    },
    "random-256m": {
        "vision": _SIGLIP_BASE,
        "text": _text(576, 30, 9, 3, 1536),
        "scale_factor": 4,
        "vocab_size": 49280,
        "longest_edge": 2048,
    },
    "random-500m": {
        "vision": _SIGLIP_BASE,
        "text": _text(960, 32, 15, 5, 2560),
        "scale_factor": 4,
        "vocab_size": 49280,
        "longest_edge": 2048,
    },
    "random-2.2b": {
        "vision": _SIGLIP_SO,
        "text": _text(2048, 24, 32, 32, 8192),
        "scale_factor": 3,
        "vocab_size": 49155,
        "longest_edge": 1536,
    },
}


def build_tokenizer(texts: Iterable[str], vocab_size: int = 1000) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on `texts`, with the special tokens and the padding side of SmolVLM."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = SPECIAL_TOKENS + ROW_COL_TOKENS

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    tokenizer.train_from_iterator(list(texts) + ["User: Assistant: \n"] * 8, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
        padding_side="left",
        additional_special_tokens=["<fake_token_around_image>", "<image>", "<end_of_utterance>"],
    )


def build_processor(shape: str, texts: Iterable[str]) -> Idefics3Processor:
    """SmolVLM's processor for a shape, its tokenizer trained on `texts`."""
    spec = SHAPES[shape]
    vision = spec["vision"]
    side = vision["image_size"]
    image_processor = Idefics3ImageProcessorPil(
        size={"longest_edge": spec["longest_edge"]},
        max_image_size={"longest_edge": side},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        do_image_splitting=True,
    )

    image_seq_len = (side // vision["patch_size"]) ** 2 // spec["scale_factor"] ** 2
    return Idefics3Processor(
        image_processor, build_tokenizer(texts), image_seq_len=image_seq_len, chat_template=CHAT_TEMPLATE
    )


def build_config(shape: str, processor: Idefics3Processor) -> Idefics3Config:
    """The model config of a shape; the tiny one takes its vocabulary from the tokenizer."""
    spec, tokenizer = SHAPES[shape], processor.tokenizer
    vocab_size = spec["vocab_size"] or len(tokenizer)
    token = tokenizer.convert_tokens_to_ids
    ids = {
        "pad_token_id": token("<|im_end|>"),
        "bos_token_id": token("<|im_start|>"),
        "eos_token_id": token("<end_of_utterance>"),
    }

    tied = bool(spec.get("tied"))  # the published models are not
    spread = {"initializer_range": spec["initializer_range"]} if "initializer_range" in spec else {}
    return Idefics3Config(
        vision_config={**spec["vision"], **spread},
        text_config={
            **spec["text"],
            **spread,
            **ids,
            "model_type": "llama",
            "vocab_size": vocab_size,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 100000.0,
            "tie_word_embeddings": tied,
        },
        scale_factor=spec["scale_factor"],
        image_token_id=token("<image>"),
        tie_word_embeddings=tied,
        **ids,
    )


def build_model(shape: str, texts: Iterable[str], folder: str | Path, seed: int = 0) -> Path:
    """Write a random model of `shape` with its processor to `folder`. The same arguments give the same bytes.

    Raises:
        ValueError: the shape is not known.
    """
    if shape not in SHAPES:
        raise ValueError(f"{shape!r} is not a shape; expected one of {', '.join(SHAPES)}")
    processor = build_processor(shape, texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Idefics3ForConditionalGeneration(build_config(shape, processor))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
