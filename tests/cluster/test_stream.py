"""The stream through real Ray Data: nothing lost, nothing twice, in order, and next to no byte read in vain."""

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from smolray.config import load_config
from smolray.data.plan import PlanLimits, build_epoch
from smolray.data.ray_jobs import ensure_index, load_index
from smolray.data.sample import Conversation, Message, Part, ShardRow, image_key
from smolray.data.stream import Stream
from smolray.model.tiny import build_model
from smolray.train.balance import MicroBatchBalancer
from tests.shards import write_shards

ROWS = 10_007  # a prime: no number of workers, micro-batches or row groups divides it


@pytest.fixture(scope="module")
def text_run(ray_cluster, tmp_path_factory):
    """10,007 rows of plain text, 64 a micro-batch, 7 micro-batches a step."""
    folder = tmp_path_factory.mktemp("text")
    rows = []
    for i in range(ROWS):
        turns = (Message("user", (Part("text", f"{i % 97} plus 1"),)), Message("assistant", (Part("text", "so"),)))
        conversation = Conversation(f"row-{i}", turns)
        rows.append(ShardRow(image_key((), conversation), (), (conversation,)))
    write_shards(str(folder / "shards"), rows, rows_per_file=1000)
    model = build_model("tiny", ["1 plus 1 so"], folder / "model")
    config = load_config(
        None,
        [f"model.path={model}", "model.dtype=float32", "train.per_device_train_batch_size=64", "train.global_batch=7"],
    )
    ensure_index(str(folder / "shards"), config)
    return str(folder / "shards"), config


def consume(ray, folder, plan, config, world_size):
    """The ids that each of `world_size` workers receives of an epoch, each through a pipeline of its own, all at the
    same time.
    """

    @ray.remote(num_cpus=0.1)
    def worker(rank):
        starts = range(0, len(plan), config.global_batch)
        numbers = [
            n
            for s in starts
            for n in MicroBatchBalancer(rank, world_size).own(range(s, min(s + config.global_batch, len(plan))))
        ]
        stream = Stream(folder, plan, numbers, config, consumers=world_size)
        seen = [(batch.meta["number"], batch.meta["ids"]) for batch in stream]
        assert [number for number, _ in seen] == numbers, "out of order"
        return [i for _, ids in seen for i in ids], stream.bytes_read, stream.bytes_needed

    return ray.get([worker.remote(rank) for rank in range(world_size)])


@pytest.mark.parametrize("world_size", [2, 3])
def test_rows_that_the_workers_do_not_divide_are_seen_exactly_once(ray_cluster, text_run, world_size):
    folder, config = text_run
    plan = build_epoch(load_index(folder, config), PlanLimits.of(config), config.seed, 0)
    parts = consume(ray_cluster, folder, plan, config, world_size)
    assert Counter(i for ids, *_ in parts for i in ids) == Counter(f"row-{i}" for i in range(ROWS))


@pytest.fixture(scope="module")
def image_run(ray_cluster, tmp_path_factory):
    """301 JPEG images of some 30 kB, two questions each."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    rows = []
    for i in range(301):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (160, 200, 3), dtype=np.uint8)).save(buffer, "JPEG", quality=80)
        images = (buffer.getvalue(),)
        conversations = tuple(
            Conversation(
                f"{i}/{q}",
                (
                    Message("user", (Part("image"), Part("text", f"question {q}"))),
                    Message("assistant", (Part("text", "so"),)),
                ),
            )
            for q in range(2)
        )
        rows.append(ShardRow(image_key(images, conversations[0]), images, conversations))
    write_shards(str(folder / "shards"), rows, rows_per_file=64)
    model = build_model("tiny", ["question so"], folder / "model")
    config = load_config(
        None,
        [f"model.path={model}", "model.dtype=float32", "train.per_device_train_batch_size=6", "train.global_batch=8"],
    )
    ensure_index(str(folder / "shards"), config)
    return str(folder / "shards"), config


@pytest.mark.parametrize("world_size", [1, 4])
def test_at_most_half_as_many_bytes_again_are_read_as_are_needed(ray_cluster, image_run, world_size):
    folder, config = image_run
    plan = build_epoch(load_index(folder, config), PlanLimits.of(config), config.seed, 0)
    parts = consume(ray_cluster, folder, plan, config, world_size)
    read, needed = sum(r for _, r, _ in parts), sum(n for *_, n in parts)
    assert needed > 301 * 20_000
    assert read / needed <= 1.5
