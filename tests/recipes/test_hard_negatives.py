"""DPO on a model's own second choices: on unseen images it comes to prefer the right answers, and answers no worse."""

import pytest
import torch
import torch.distributed as dist

from jobs.hard_negatives import answers_by_type, hard_negatives, shard_rows
from smolray.config import RunConfig, load_config, to_yaml
from smolray.data.collate import Group, collate_prompts, collate_training
from smolray.data.encode import cached_encoder
from smolray.data.local import LocalStream, local_plan
from smolray.evaluate.evaluator import evaluate
from smolray.evaluate.preference import margins, preference
from smolray.export import export_run
from smolray.model.tiny import build_model
from smolray.model.trained import trained_model
from smolray.run.checkpoint import Progress, chosen_checkpoint, save
from smolray.storage import write_bytes
from smolray.train.loop import TrainLoop
from tests.gloo import build_engine, run_workers
from tests.shards import vqa_rows, write_shards

IMAGES, MINED, TESTED = 1500, 600, 150  # for the base; others for its pairs, where it errs as it will; unseen
COMMON = [
    "model.dtype=float32",
    "engine.stage=0",
    "train.global_batch=2",
    "data.max_questions_per_image=32",
    "data.max_length=1024",
    "optimizer.warmup_ratio=0.05",
    "resources.num_workers=2",
]
BASE = ["train.per_device_train_batch_size=64", "optimizer.learning_rate=2e-3", "optimizer.weight_decay=0.01"]
PAIRS = [
    "method=dpo",
    "train.per_device_train_batch_size=32",
    "train.num_train_epochs=2",
    "optimizer.learning_rate=3e-4",
    "dpo.loss_type=[sigmoid,sft]",
    "dpo.loss_weights=[1,0.5]",
]


def train(config: RunConfig, shards: str):
    """Train a run to its end and keep its checkpoint. Collective; returns the engine."""
    engine = build_engine(config)
    plans = [local_plan(shards, config, epoch) for epoch in range(config.train.num_train_epochs)]
    done = TrainLoop(
        config, engine, plans, lambda plan, numbers: LocalStream(shards, plan, numbers, config), Progress()
    ).run()
    state = engine.state()
    if dist.get_rank() == 0:
        write_bytes(f"{config.run_dir}/config.yaml", to_yaml(config).encode())
        save(config.run_dir, state, done, {}, {})
    return engine


def figures(model, config, pairs):
    """Exact match of the free answers and preference accuracy of `pairs`, with their intervals. Collective."""
    encoder, rank, world = (
        cached_encoder(config.model, config.data, config.image),
        dist.get_rank(),
        dist.get_world_size(),
    )
    mine = [Group(row, tuple(range(len(row.conversations)))) for row in pairs[rank::world]]
    parts = [mine[start : start + 16] for start in range(0, len(mine), 16)]
    training, device = model.training, torch.device("cpu")
    model.eval()
    report = evaluate(model, (collate_prompts(part, encoder) for part in parts), encoder, 6, device)
    preferred = preference(
        margins(model, (collate_training(part, encoder) for part in parts), device), report.predictions
    )
    model.train(training)
    return {"exact_match": report.metrics["exact_match"], "preference": preferred}


def train_base(folder: str, overrides: list[str]) -> None:
    train(
        load_config(
            None, [*COMMON, *BASE, f"storage={folder}", "name=base", f"data.train={folder}/questions", *overrides]
        ),
        f"{folder}/questions",
    )


def train_on_pairs(folder: str, overrides: list[str]) -> list[dict]:
    """The figures on unseen images before and after DPO."""
    config = load_config(
        None,
        [
            *COMMON,
            *PAIRS,
            f"storage={folder}",
            "name=dpo",
            f"data.train={folder}/pairs",
            f"model.path={folder}/base/export",
            *overrides,
        ],
    )
    tested = shard_rows(f"{folder}/tested")
    before = figures(build_engine(config).model, config, tested)
    return [before, figures(train(config, f"{folder}/pairs").model, config, tested)]


def pairs_of(folder: str, rows):
    """`rows` with the second choices of the base."""
    config = load_config(f"{folder}/base/config.yaml")
    model = trained_model(config, chosen_checkpoint(config.run_dir))
    encoder = cached_encoder(config.model, config.data.replace({"max_length": 10**6}), config.image)
    return list(hard_negatives(model, rows, answers_by_type(rows), encoder, torch.device("cpu")))


def prepare(folder: str, overrides: list[str]) -> None:
    """A base that answers questions, trained from nothing and exported; pairs of its second choices to train on, and
    unseen ones.
    """
    rows = vqa_rows("train", IMAGES + MINED)
    write_shards(f"{folder}/questions", rows[:IMAGES])
    path = build_model(
        "tiny",
        sorted({"\n ".join(m.text for m in c.messages) for row in rows for c in row.conversations}),
        f"{folder}/random",
    )
    run_workers(train_base, 2, folder, [f"model.path={path}", *overrides])
    export_run(f"{folder}/base")
    write_shards(f"{folder}/pairs", pairs_of(folder, rows[IMAGES:]))
    write_shards(f"{folder}/tested", pairs_of(folder, vqa_rows("test", TESTED)))


@pytest.mark.slow
def test_dpo_on_second_choices_raises_preferences_and_keeps_accuracy(tmp_path):
    prepare(str(tmp_path), ["train.num_train_epochs=3"])
    before, after = run_workers(train_on_pairs, 2, str(tmp_path), [])
    for name in ("preference", "exact_match"):
        print(f"{name}: {before[name]['overall']} -> {after[name]['overall']}")
    assert after["preference"]["overall"]["value"] > before["preference"]["overall"]["high"]
    assert after["exact_match"]["overall"]["value"] >= before["exact_match"]["overall"]["low"]
