"""Packed training learns what separate training learns from the same number of samples, in less time."""

import time
from pathlib import Path

import numpy as np
import pytest

from jobs.easyvqa import vqa_rows
from smolray.config import load_config
from smolray.data.collate import Group, collate_prompts
from smolray.data.encode import cached_encoder
from smolray.data.local import LocalStream, local_plan
from smolray.data.shards import write_shards
from smolray.model.decoding import greedy, stop_ids_of
from smolray.model.tiny import build_model
from smolray.run.checkpoint import Progress
from smolray.train.loop import TrainLoop
from tests.gloo import build_engine, run_workers

IMAGES, HELD_OUT, EPOCHS, SEEDS = 1200, 250, 4, (0, 1, 2)


def accuracies(folder: str) -> dict[str, list[list[float]]]:
    """(accuracy on the held-out split, CPU-seconds of the training) for each seed, by kind of packing."""
    rows, held_out = vqa_rows("train", IMAGES), vqa_rows("test", HELD_OUT)
    shards = write_shards(f"{folder}/shards", rows)
    texts = [m.text for row in rows[:200] for c in row.conversations for m in c.messages]
    found: dict[str, list[list[float]]] = {"full": [], "none": []}
    for seed in SEEDS:
        model = build_model("tiny", texts, Path(folder) / f"model-{seed}", seed)
        for packing, results in found.items():
            config = load_config(
                None,
                [
                    f"model.path={model}",
                    "model.dtype=float32",
                    "engine.stage=0",
                    f"data.packing={packing}",
                    f"seed={seed}",
                    # five tiles: 80 tokens an image, as many as SmolVLM's 64 and its markers
                    "image.longest_edge=128",
                    "image.upscale=true",
                    f"train.num_train_epochs={EPOCHS}",
                    "train.per_device_train_batch_size=32",
                    "data.max_questions_per_image=32",
                    "data.max_length=2048",
                    "optimizer.learning_rate=2e-3",
                    "optimizer.warmup_ratio=0.05",
                ],
            )
            engine = build_engine(config)
            plans = [local_plan(shards, config, epoch) for epoch in range(EPOCHS)]
            began = time.process_time()
            TrainLoop(
                config,
                engine,
                plans,
                lambda plan, numbers, config=config: LocalStream(shards, plan, numbers, config),
                Progress(),
            ).run()
            seconds = time.process_time() - began
            encoder, right, asked = cached_encoder(config.model, config.data, config.image), 0, 0
            engine.model.eval()
            for start in range(0, len(held_out), 16):
                groups = [Group(row, tuple(range(len(row.conversations)))) for row in held_out[start : start + 16]]
                batch = collate_prompts(groups, encoder)
                said = encoder.tokenizer.batch_decode(
                    greedy(engine.model, batch, 3, stop_ids_of(engine.model, encoder)), skip_special_tokens=True
                )
                right += sum(
                    text.strip() == record["answer"] for text, record in zip(said, batch.meta["records"], strict=True)
                )
                asked += len(said)
            results.append([right / asked, seconds])
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_packed_training_is_as_accurate_and_faster(tmp_path):
    found = run_workers(accuracies, 1, str(tmp_path))
    (packed, packed_s), (separate, separate_s) = (np.array(found[packing]).T for packing in ("full", "none"))
    difference = packed - separate
    interval = 4.303 * difference.std(ddof=1) / np.sqrt(len(SEEDS))  # Student's t of three seeds, 95 %
    print(
        f"packed {packed}, separate {separate}: {difference.mean():+.4f} +- {interval:.4f}; "
        f"{separate_s.sum() / packed_s.sum():.2f} times as fast"
    )
    assert difference.mean() > -max(interval, 0.01), found
    assert separate_s.sum() > 2 * packed_s.sum()
