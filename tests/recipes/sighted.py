"""What the recipes do to a pretrained model: SmolVLM-256M with SmolLM2's weights and a tower that sees (smollm2.py) is
taught by each, in a fixed number of steps, to name the colours and the shapes in unseen images.

`python -m tests.recipes.sighted FOLDER [CASE ...]` prints the table of jobs/README.md: all cases, one after another in
one process. The model is made in FOLDER once.
"""

import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from smolray.config import RunConfig, load_config
from smolray.data.answers import count_answers
from smolray.data.collate import Group, collate_prompts, collate_training
from smolray.data.encode import cached_encoder
from smolray.data.local import LocalStream, local_index
from smolray.data.plan import PlanLimits, build_epoch
from smolray.data.sample import ShardRow
from smolray.data.shards import read_manifest
from smolray.engine.base import Engine
from smolray.evaluate.baseline import blind_baseline
from smolray.evaluate.evaluator import evaluate
from smolray.evaluate.loss import mean_loss
from smolray.model.load import base_model
from smolray.run.checkpoint import Progress
from smolray.train.loop import TrainLoop
from smolray.train.refusal import NonFiniteStepError
from tests.gloo import build_engine, run_workers
from tests.shards import captioned, vqa_rows, write_shards
from tests.smollm2 import install, seeing_model, with_sight

TRAINED_IMAGES, TESTED_IMAGES, STEPS = 4000, 60, 60
# 16 conversations a step; the recipes' warm-up is for longer runs
COMMON = [
    "model.dtype=float32",
    "model.gradient_checkpointing=false",
    "train.per_device_train_batch_size=16",
    "train.global_batch=1",
    "optimizer.warmup_steps=6",
    "engine.stage=0",
    "resources.num_workers=1",
]
LORA, QLORA, FULL = "vqa_lora", "vqav2_qlora", "vqa_full"
FOUR_BITS = ["model.load_in_8bit=false", "model.load_in_4bit=true"]
# the recipe's own rate where none is named; so few steps need a larger one
CASES: dict[str, tuple[str, list[str]]] = {
    "lora": (LORA, []),
    "lora 1e-3": (LORA, ["optimizer.learning_rate=1e-3"]),
    "qlora-8 1e-3": (QLORA, ["optimizer.learning_rate=1e-3"]),
    "qlora-4 1e-3": (QLORA, ["optimizer.learning_rate=1e-3", *FOUR_BITS]),
    "full": (FULL, []),
}

ENGLISH = (
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in Liberty, "
    "and dedicated to the proposition that all men are created equal. Now we are engaged in a great civil war, testing "
    "whether that nation, or any nation so conceived and so dedicated, can long endure. We are met on a great "
    "battle-field of that war.",
    "The old lighthouse stood at the end of a narrow road that ran along the cliffs. Every evening, an hour before "
    "sunset, Martha climbed the stairs to light the lamp. She had done this for thirty years, first with her father, "
    "and then alone. The ships that passed at night never knew her name, but the captains looked for her light.",
)


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


def questions(split: str, images: int) -> list[ShardRow]:
    """Rows with their questions for a colour or a shape. The answers to the others are three quarters right when the
    image is not looked at, and tell little of a short run.
    """
    rows = []
    for row in vqa_rows(split, images):
        kept = tuple(c for c in row.conversations if c.type != "yes/no")
        rows += [replace(row, conversations=kept)] if kept else []
    return rows


def without_looking(shards: str, asked: list[ShardRow]) -> float:
    """The accuracy of the most frequent answer to the same words in `shards`."""
    names = [file.name for file in read_manifest(shards).files]
    records = [{"question": c.messages[0].text, "answers": list(c.answers)} for row in asked for c in row.conversations]
    return blind_baseline([count_answers(shards, name, n) for n, name in enumerate(names)], records)


def run_cases(folder: str, names: list[str], steps: int = STEPS) -> dict[str, dict[str, Any]]:
    """The figures of each case, in a worker."""
    found = {}
    for name in names:
        recipe, overrides = CASES[name]
        places = [f"storage={folder}", f"data.train={folder}/named", f"model.path={folder}/sighted"]
        config = load_config(recipe, [*places, *COMMON, f"train.max_steps={steps}", *overrides])
        found[name] = figures_of(config, questions("test", TESTED_IMAGES))
        print(json.dumps({"case": name} | found[name]), flush=True)
    return found


def figures_of(config: RunConfig, tested: list[ShardRow]) -> dict[str, Any]:
    """Train to the end or to a loss that is not finite; the losses of `tested` before and after, and their answers."""
    began, engine, losses = time.process_time(), build_engine(config), []
    plan = build_epoch(local_index(config.data.train_folder, config), PlanLimits.of(config), config.seed, 0)
    loop = TrainLoop(
        config,
        engine,
        [plan],
        lambda plan, numbers: LocalStream(config.data.train_folder, plan, numbers, config),
        Progress(),
        [lambda step_info: losses.append(step_info.metrics.loss)],
    )
    before, started = loss_of(engine, config, tested), time.process_time()
    try:
        loop.run()
    except NonFiniteStepError:
        return {"steps": len(losses), "loss before": before, "loss": math.nan}
    trained = time.process_time()

    engine.model.eval()
    encoder = cached_encoder(config.model, config.data, config.image)
    prompts = (collate_prompts(part, encoder) for part in parts_of(tested))
    answers = evaluate(engine.model, prompts, encoder, 4, engine.device).accuracy
    return answers | {
        "steps": len(losses),
        "loss before": before,
        "loss": loss_of(engine, config, tested),
        "losses": [sum(losses[n : n + 10]) / 10 for n in range(0, len(losses), 10)],
        "english": text_loss(base_model(engine.model), Path(config.model.path)),
        "seconds a step": (trained - started) / len(losses),
        "cpu seconds": time.process_time() - began,
    }


def parts_of(rows: list[ShardRow]) -> list[list[Group]]:
    groups = [Group(row, tuple(range(len(row.conversations)))) for row in rows]
    return [groups[start : start + 16] for start in range(0, len(groups), 16)]


def loss_of(engine: Engine, config: RunConfig, rows: list[ShardRow]) -> float:
    """The mean loss of the answers in `rows`."""
    encoder = cached_encoder(config.model, config.data, config.image)
    batches = [collate_training(part, encoder) for part in parts_of(rows)]
    return mean_loss(engine.model, batches, sum(len(b.target_ids) for b in batches), engine.device)


def main() -> None:
    """Run the cases that are named, or all, and print a line for each."""
    folder, names = Path(sys.argv[1]).absolute(), sys.argv[2:] or list(CASES)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "sighted/model.safetensors").exists():
        base = seeing_model(install(folder / "site"), folder / "base")
        with_sight(base, folder / "sighted", captioned(vqa_rows("train", TRAINED_IMAGES)), steps=1000)
    if not (folder / "named").exists():
        write_shards(str(folder / "named"), questions("train", TRAINED_IMAGES))
    blind = without_looking(str(folder / "named"), questions("test", TESTED_IMAGES))
    print(f"without looking: {blind:.3f}", flush=True)
    run_workers(run_cases, 1, str(folder), names)


if __name__ == "__main__":
    main()
