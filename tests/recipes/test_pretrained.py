"""A pretrained language model in training: SmolVLM-256M with the weights of SmolLM2-135M speaks English, learns to see
with a tower of random weights, and still speaks English after its LoRA was merged.
"""

import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from smolray.config import ModelConfig, load_config
from smolray.data.sample import ShardRow
from smolray.export import export_run
from smolray.model.load import load_model
from tests.gloo import run_workers
from tests.recipes.sighted import ENGLISH, text_loss, without_looking
from tests.recipes.test_methods import trained
from tests.shards import captioned, vqa_rows, write_shards
from tests.smollm2 import install, own_answers, seeing_model, told_by_the_tower, with_sight

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
QUESTION = "<|im_start|>user\nWhat is the capital of Italy?<|im_end|>\n<|im_start|>assistant\n"
ANSWER = "The capital of Italy is Rome."


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    return seeing_model(install(folder / "site"), folder / "base")


def completed(model: torch.nn.Module, folder: Path) -> str:
    """The answer to QUESTION, by greedy decoding."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = torch.tensor([tokenizer(QUESTION, add_special_tokens=False)["input_ids"]])
    tokens = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=2
    )
    return tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True).strip()


def in_the_order_of_gguf(model: torch.nn.Module) -> torch.nn.Module:
    """The rows of the projections as they lie in the file: rotary pairs side by side."""
    for layer in model.model.text_model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            halves = projection.weight.data.unflatten(0, (-1, 2, layer.self_attn.head_dim // 2))
            projection.weight.data = halves.transpose(1, 2).reshape(projection.weight.shape).contiguous()
    return model


def test_the_loss_of_english_is_that_of_a_trained_model(base):
    model = load_model(ModelConfig(path=str(base), dtype="float32")).eval()
    pretrained = text_loss(model, base)
    assert completed(model, base) == ANSWER
    random = text_loss(AutoModelForImageTextToText.from_config(model.config, dtype=torch.float32).eval(), base)
    in_file_order = text_loss(in_the_order_of_gguf(model), base)
    print(f"\nnats a token: pretrained {pretrained:.3f}, rows in GGUF's order {in_file_order:.3f}, random {random:.3f}")
    assert pretrained < 3.5 and in_file_order > pretrained + 1 and random > 10


def teach(folder: str, base: str, shards: str) -> dict[str, float]:
    """Twelve steps of the recipe vqa_lora on questions, in a worker."""
    quick = ["model.dtype=float32", "train.global_batch=2", "train.max_steps=12", "optimizer.warmup_steps=2"]
    settings = ["name=taught", f"storage={folder}", f"data.train={shards}", f"model.path={base}"]
    config = load_config("vqa_lora", [*settings, *quick, "engine.stage=0", "resources.num_workers=1"])
    return trained(config, shards, vqa_rows("test", 2))


def test_a_merged_lora_leaves_its_english_as_it_was(base, tmp_path):
    before = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
    shards = write_shards(str(tmp_path / "questions"), vqa_rows("train", 30))
    taught = run_workers(teach, 1, str(tmp_path), str(base), shards)
    export = Path(export_run(str(tmp_path / "taught")))
    after = AutoModelForImageTextToText.from_pretrained(export, dtype=torch.float32).eval()

    moved = [n for n, p in after.named_parameters() if not torch.equal(p, before.state_dict()[n])]
    losses = [text_loss(model, base) for model in (before, after)]
    print(f"\n{taught}\nnats a token: {losses[0]:.3f} -> {losses[1]:.3f}")
    assert len(moved) == 30 * 7, "seven projections of each text layer, and nothing else"
    assert losses[1] < losses[0] + 0.05
    assert completed(after, export) == ANSWER


# questions about images, and for every eight of them one without an image
LESSONS = [
    "model.dtype=float32",
    "model.train=[vision,connector]",
    "engine.stage=0",
    "resources.num_workers=1",
    "train.global_batch=1",
    "train.per_device_train_batch_size=16",
    "data.max_questions_per_image=4",
    "train.max_steps=360",
    "lora.lora_dropout=0",
    "lora.target_modules=[q_proj,k_proj,v_proj,o_proj]",
    "optimizer.learning_rate=3e-4",
    "optimizer.learning_rates={connector: 2e-6, vision: 1e-4}",
    "optimizer.warmup_steps=20",
]
TESTED_IMAGES = 40


def lessons(base: Path) -> list[ShardRow]:
    """Questions about images, and for every eight of them one without an image and the model's own answer."""
    seen, own = vqa_rows("train", 800), own_answers(base)
    count = sum(len(row.conversations) for row in seen) // 8
    rows = [*seen, *(replace(own[n % len(own)], key=f"own {n}") for n in range(count))]
    random.Random(0).shuffle(rows)
    return rows


def learn_to_see(folder: str) -> dict[str, float]:
    """A run on the lessons, in a worker; questions about unseen images answered."""
    settings = ["name=answers", f"storage={folder}", f"data.train={folder}/lessons", f"model.path={folder}/sighted"]
    config = load_config("vqa_lora", [*settings, *LESSONS])
    return trained(config, config.data.train, vqa_rows("test", TESTED_IMAGES))


@pytest.mark.timeout(7200)
def test_it_learns_to_see_and_still_speaks_english(base, tmp_path):
    began, rows = time.process_time(), vqa_rows("train", 4000)
    sighted = with_sight(base, tmp_path / "sighted", captioned(rows), steps=1000)
    print(f"\n{told_by_the_tower(sighted, captioned(vqa_rows('test', 200)))}, {time.process_time() - began:.0f} CPU-s")
    shards = write_shards(str(tmp_path / "questions"), rows)
    taught = lessons(base)
    write_shards(str(tmp_path / "lessons"), taught)
    prepared = time.process_time() - began
    found = run_workers(learn_to_see, 1, str(tmp_path))
    blind = without_looking(shards, vqa_rows("test", TESTED_IMAGES))

    export = Path(export_run(str(tmp_path / "answers")))
    models = [AutoModelForImageTextToText.from_pretrained(f, dtype=torch.float32).eval() for f in (base, export)]
    losses = [text_loss(model, base) for model in models]
    print(f"{found}\nblind {blind:.3f}, {prepared:.0f} CPU-s before\nnats a token: {losses[0]:.3f} -> {losses[1]:.3f}")
    words = " ".join(message.text for row in taught for c in row.conversations for message in c.messages)
    assert not any(sentence in words for text in ENGLISH for sentence in text.split(". "))
    assert found["overall"] >= blind + 0.15
    assert prepared + found["cpu_seconds"] < 3600
    assert losses[1] < losses[0] + 0.05
    assert completed(models[1], base) == ANSWER
