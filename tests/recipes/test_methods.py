"""Every method learns: a base that can only caption easy-VQA's images is taught by each to answer questions about
images it has not seen.
"""

import time

import pytest
import torch.distributed as dist

from smolray.config import RunConfig, load_config, to_yaml
from smolray.data.answers import count_answers
from smolray.data.collate import Group, collate_prompts
from smolray.data.encode import cached_encoder
from smolray.data.local import LocalStream, local_index
from smolray.data.plan import PlanLimits, build_epoch
from smolray.data.sample import ShardRow
from smolray.evaluate.baseline import blind_baseline
from smolray.evaluate.evaluator import evaluate
from smolray.export import export_run
from smolray.model.tiny import build_model
from smolray.run.checkpoint import Progress, save
from smolray.storage import write_bytes
from smolray.train.loop import TrainLoop
from tests.gloo import build_engine, run_workers
from tests.shards import captioned, vqa_rows, write_shards

TESTED_IMAGES = 200
LORA = "lora={r: 16, lora_alpha: 32, groups: [text]}"
METHODS = {
    "full": ["optimizer.learning_rate=1e-3"],
    "lora": [LORA, "model.train=[]", "optimizer.learning_rate=5e-3"],
    "qlora-4": [LORA, "model.train=[]", "optimizer.learning_rate=5e-3", "model.load_in_4bit=true"],
    "qlora-8": [LORA, "model.train=[]", "optimizer.learning_rate=5e-3", "model.load_in_8bit=true"],
    "8-bit-adam": ["optimizer.learning_rate=1e-3", "optimizer.name=adamw_8bit"],
}
COMMON = [
    "model.dtype=float32",
    "engine.stage=0",
    "train.per_device_train_batch_size=64",
    "train.global_batch=2",
    "data.max_questions_per_image=32",
    "data.max_length=1024",
    "optimizer.warmup_ratio=0.05",
    "optimizer.weight_decay=0.01",
    "resources.num_workers=2",
]


def trained(config: RunConfig, shards: str, tested: list[ShardRow]) -> dict[str, float]:
    """Train a run to its end, keep its checkpoint, and answer the questions of `tested`. Collective."""
    rank, world, began = dist.get_rank(), dist.get_world_size(), time.process_time()
    engine, encoder = build_engine(config), cached_encoder(config.model, config.data, config.image)
    index = local_index(shards, config)
    plans = [
        build_epoch(index, PlanLimits.of(config), config.seed, epoch) for epoch in range(config.train.num_train_epochs)
    ]
    losses: list[float] = []
    done = TrainLoop(
        config,
        engine,
        plans,
        lambda plan, numbers: LocalStream(shards, plan, numbers, config),
        Progress(),
        [lambda step_info: losses.append(step_info.metrics.loss)],
    ).run()
    state, seconds = engine.state(), time.process_time() - began
    if rank == 0:
        write_bytes(f"{config.run_dir}/config.yaml", to_yaml(config).encode())
        save(config.run_dir, state, done, {}, {})
    engine.model.eval()
    mine = [Group(row, tuple(range(len(row.conversations)))) for row in tested[rank::world]]
    prompts = (collate_prompts(mine[start : start + 16], encoder) for start in range(0, len(mine), 16))
    report = evaluate(engine.model, prompts, encoder, 6, engine.device)
    return report.accuracy | {
        "questions": report.samples,
        "steps": done.step,
        "loss": sum(losses[-20:]) / 20,
        "cpu_seconds": round(seconds),
    }


def train_base(folder: str, overrides: list[str]) -> dict[str, float]:
    config = load_config(
        None,
        [
            *COMMON,
            f"storage={folder}",
            "name=base",
            f"data.train={folder}/captions",
            "optimizer.learning_rate=2e-3",
            *overrides,
        ],
    )
    return trained(config, f"{folder}/captions", captioned(vqa_rows("test", TESTED_IMAGES)))


def train_methods(folder: str, methods: list[str], overrides: list[str]) -> dict[str, dict[str, float]]:
    tested, found = vqa_rows("test", TESTED_IMAGES), {}
    for name in methods:
        settings = [
            *COMMON,
            f"storage={folder}",
            f"name={name}",
            f"data.train={folder}/questions",
            f"model.path={folder}/base/export",
        ]
        found[name] = trained(load_config(None, [*settings, *METHODS[name], *overrides]), f"{folder}/questions", tested)
        if dist.get_rank() == 0:
            print(name, found[name], flush=True)
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run folder with shards of captions and of questions and an exported base that was trained on the captions."""
    folder = tmp_path_factory.mktemp("methods")
    return folder, prepare(str(folder), 4000, ["train.num_train_epochs=8"])


def prepare(folder: str, images: int, overrides: list[str]) -> dict[str, float]:
    rows = vqa_rows("train", images)
    write_shards(f"{folder}/questions", rows)
    captions = captioned(rows)
    write_shards(f"{folder}/captions", captions)
    texts = sorted({"\n ".join(m.text for m in c.messages) for row in [*rows, *captions] for c in row.conversations})
    path = build_model("tiny", texts, f"{folder}/random")
    found = run_workers(train_base, 2, folder, [f"model.path={path}", *overrides])
    export_run(f"{folder}/base")
    return found


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_each_method_looks_at_least_12_points_further_than_the_blind(base):
    folder, captions = base
    print(f"\nbase: {captions}")
    found = run_workers(train_methods, 2, str(folder), list(METHODS), ["train.num_train_epochs=3"])
    shards = sorted(p.name for p in (folder / "questions").glob("*.parquet"))
    asked = [c for row in vqa_rows("test", TESTED_IMAGES) for c in row.conversations]
    records = [{"question": c.messages[0].text, "answers": list(c.answers)} for c in asked]
    blind = blind_baseline(
        [count_answers(str(folder / "questions"), name, n) for n, name in enumerate(shards)], records
    )
    print(f"blind: {blind:.3f}", *(f"\n{name}: {figures}" for name, figures in found.items()))
    for name, figures in found.items():
        assert figures["overall"] >= max(blind, 0.67) + 0.12, name
