"""Captions of real scans, trained from random weights in two CPU-minutes: written exactly, found by their text."""

import io
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from smolray.config import load_config
from smolray.data.collate import Group, collate_prompts, collate_training
from smolray.data.encode import cached_encoder
from smolray.data.local import LocalStream, local_plan
from smolray.data.sample import Conversation, Message, Part, ShardRow, image_key
from smolray.data.shards import write_shards
from smolray.evaluate.retrieval import average_precision
from smolray.model.decoding import greedy, stop_ids_of
from smolray.model.forward import target_states
from smolray.model.load import base_model, load_model
from smolray.model.tiny import build_model
from smolray.objectives.base import completion_logps
from smolray.run.checkpoint import Progress
from smolray.train.loop import TrainLoop
from tests.gloo import build_engine, run_workers

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELD_OUT = 360


def captioned(number: int, scan: np.ndarray, digit: int) -> ShardRow:
    """A scan of 8 x 8 grey values 0..16 as a PNG, and what it shows."""
    sink = io.BytesIO()
    Image.fromarray((scan * 255 / 16).astype(np.uint8)).resize((64, 64), Image.Resampling.BICUBIC).save(sink, "PNG")
    turns = (
        Message("user", (Part("image"),)),
        Message("assistant", (Part("text", f"a photo of the digit {WORDS[digit]}"),)),
    )
    conversation = Conversation(str(number), turns)
    return ShardRow(image_key((sink.getvalue(),), conversation), (sink.getvalue(),), (conversation,))


@torch.no_grad()
def caption_logps(model, image: bytes, encoder) -> np.ndarray:
    """Mean log-probability per token of each digit's caption for one image: (10,)."""
    turn = Message("user", (Part("image"),))
    captions = [Message("assistant", (Part("text", f"a photo of the digit {word}"),)) for word in WORDS]
    conversations = tuple(Conversation(str(n), (turn, caption)) for n, caption in enumerate(captions))
    row = ShardRow(image_key((image,), conversations[0]), (image,), conversations)
    batch = collate_training([Group(row, tuple(range(len(WORDS))))], encoder)
    sums = completion_logps(base_model(model).lm_head, target_states(model, batch), batch)
    return (sums / torch.bincount(batch.target_completion, minlength=len(sums))).double().numpy()


def train_and_caption(folder: str) -> dict[str, float]:
    """Train on 1,437 scans; exact captions and mean average precision of the rest, with CPU-seconds of the training."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    rows = [captioned(n, digits.images[n], int(digits.target[n])) for n in order.tolist()]
    shards = write_shards(f"{folder}/shards", rows[:-HELD_OUT])
    texts = [row.conversations[0].messages[1].text for row in rows]
    config = load_config(
        None,
        [
            f"model.path={build_model('tiny', texts, Path(folder) / 'model')}",
            "model.dtype=float32",
            "engine.stage=0",
            "train.num_train_epochs=16",
            "train.per_device_train_batch_size=32",
            "optimizer.learning_rate=2e-3",
            "optimizer.warmup_ratio=0.1",
        ],
    )
    encoder = cached_encoder(config.model, config.data, config.image)
    tested, truth = rows[-HELD_OUT:], digits.target[order[-HELD_OUT:]]

    def precision(model) -> float:
        logps = np.stack([caption_logps(model, row.images[0], encoder) for row in tested], axis=1)
        return float(average_precision(logps, truth[None, :] == np.arange(len(WORDS))[:, None]).mean())

    before = precision(load_model(config.model).eval())
    engine = build_engine(config)
    began = time.process_time()
    plans = [local_plan(shards, config, epoch) for epoch in range(config.train.num_train_epochs)]
    TrainLoop(config, engine, plans, lambda plan, numbers: LocalStream(shards, plan, numbers, config), Progress()).run()
    seconds = time.process_time() - began
    engine.model.eval()
    exact = 0
    for start in range(0, HELD_OUT, 60):
        batch = collate_prompts([Group(row, (0,)) for row in tested[start : start + 60]], encoder)
        said = encoder.tokenizer.batch_decode(
            greedy(engine.model, batch, 16, stop_ids_of(engine.model, encoder)), skip_special_tokens=True
        )
        exact += sum(text.strip() == record["answer"] for text, record in zip(said, batch.meta["records"], strict=True))
    return {"exact": exact / HELD_OUT, "cpu_seconds": seconds, "untrained": before, "trained": precision(engine.model)}


@pytest.mark.slow
def test_digits_are_captioned_exactly_and_found_by_their_captions(tmp_path):
    found = run_workers(train_and_caption, 1, str(tmp_path))
    print(found)
    assert found["exact"] >= 0.95
    assert found["cpu_seconds"] < 120
    assert found["trained"] > 0.95 and found["untrained"] < 0.3
