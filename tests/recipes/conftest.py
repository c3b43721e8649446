"""Shards of a hundred easy-vqa images and the tiny model for them, shared by the recipes; the same as preference data
for DPO.
"""

import pytest

from smolray.model.tiny import build_model
from tests.shards import preference_rows, vqa_rows, write_shards


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    """(shard folder, overrides of a run on it): fp32, three micro-batches a step, so that they divide evenly by 1 and 3
    workers and not by 2.
    """
    folder = tmp_path_factory.mktemp("recipe")
    rows = vqa_rows("train", 120)
    shards = write_shards(str(folder / "shards"), rows)
    texts = [f"{c.messages[0].text}\n {c.messages[1].text}" for row in rows for c in row.conversations]
    model = build_model("tiny", texts, folder / "model")
    overrides = [
        f"model.path={model}",
        "model.dtype=float32",
        "train.per_device_train_batch_size=6",
        "train.global_batch=3",
        "optimizer.learning_rate=1e-3",
        "optimizer.weight_decay=0.1",
        "optimizer.lr_scheduler_type=constant",
        "engine.stage=0",
    ]
    return shards, overrides


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """(shard folder, overrides of a DPO run on it): three micro-batches of six pairs a step, each pair a group of its
    own.
    """
    folder = tmp_path_factory.mktemp("pairs")
    rows = preference_rows("train", 120)
    shards = write_shards(str(folder / "shards"), rows)
    texts = [
        f"{c.messages[0].text}\n {ending[0].text}"
        for row in rows
        for c in row.conversations
        for ending in (c.chosen, c.rejected)
    ]
    model = build_model("tiny", texts, folder / "model")
    overrides = [
        "method=dpo",
        f"model.path={model}",
        "model.dtype=float32",
        "train.per_device_train_batch_size=6",
        "train.global_batch=3",
        "optimizer.learning_rate=1e-3",
        "optimizer.weight_decay=0.1",
        "optimizer.lr_scheduler_type=constant",
        "engine.stage=0",
    ]
    return shards, overrides
