"""A pretrained language model in training: SmolVLM-256M with the weights of SmolLM2-135M speaks English, and still does
after a LoRA was trained on its text and merged.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from smolray.config import ModelConfig, load_config
from smolray.export import export_run
from smolray.model.load import load_model
from tests.gloo import run_workers
from tests.recipes.test_methods import trained
from tests.shards import vqa_rows, write_shards
from tests.smollm2 import install, seeing_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ENGLISH = (
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in Liberty, "
    "and dedicated to the proposition that all men are created equal. Now we are engaged in a great civil war, testing "
    "whether that nation, or any nation so conceived and so dedicated, can long endure. We are met on a great "
    "battle-field of that war.",
    "The old lighthouse stood at the end of a narrow road that ran along the cliffs. Every evening, an hour before "
    "sunset, Martha climbed the stairs to light the lamp. She had done this for thirty years, first with her father, "
    "and then alone. The ships that passed at night never knew her name, but the captains looked for her light.",
)
QUESTION = "<|im_start|>user\nWhat is the capital of Italy?<|im_end|>\n<|im_start|>assistant\n"
ANSWER = "The capital of Italy is Rome."


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    return seeing_model(install(folder / "site"), folder / "base")


def text_loss(model: torch.nn.Module, folder: Path) -> float:
    """Mean cross entropy of a token of ENGLISH, in nats."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    total, count = 0.0, 0
    for text in ENGLISH:
        ids = torch.tensor([tokenizer("<|im_start|>" + text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


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
