"""Evaluation decodes as many questions together as the memory holds, to the same answers. The memory is pretended."""

import pytest
import torch
import torch.distributed as dist
from transformers import Idefics3ForConditionalGeneration

from smolray.config import ConfigError, ModelConfig
from smolray.data.collate import Group, collate_prompts
from smolray.evaluate.fit import PartsThatFit, bytes_of_token, most_tokens
from smolray.model.decoding import greedy
from smolray.model.load import load_model
from smolray.model.tiny import build_config
from tests.offline import asked, encoder_of, picture, shard_row

pytestmark = pytest.mark.seconds


@pytest.fixture(scope="module")
def model(tiny_path):
    return load_model(ModelConfig(path=tiny_path, dtype="float32")).eval()


@pytest.fixture
def batch(processor):
    """Seven sequences: of two images of several tiles, of one in two rows, of none; one to three questions each."""
    encoder = encoder_of(processor, {"longest_edge": 128}, max_length=4096)
    shared = picture(64, 64, 9)
    pictures = [[picture(120, 90, 1), picture(40, 40, 2)], [shared], [], [picture(120, 60, 4)], [shared], [], [shared]]
    rows = [
        shard_row(images, *(asked(f"what is {q} in {n}?", "box", len(images), f"{n}-{q}") for q in range(1 + n % 3)))
        for n, images in enumerate(pictures)
    ]
    return collate_prompts([Group(row, tuple(range(len(row.conversations)))) for row in rows], encoder)


class Memory:
    """Decodes as long as there are at most `rows` sequences, and lists what it was given."""

    def __init__(self, model, rows):
        self.model, self.rows, self.seen = model, rows, []

    def __call__(self, batch):
        self.seen.append(len(batch.input_ids))
        if len(batch.input_ids) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        assert len(batch.meta["ids"]) == len(batch.meta["records"]) == len(batch.ends)
        return [(name, ids) for name, ids in zip(batch.meta["ids"], self.answers(batch), strict=True)]

    def answers(self, batch):
        return greedy(self.model, batch, 6, {1})


@pytest.mark.parametrize("rows", [1, 2, 3, 6, 7])
def test_what_does_not_fit_is_halved_to_the_same_answers(model, batch, rows):
    whole = Memory(model, 7)(batch)
    small = Memory(model, rows)
    decode = PartsThatFit(small)
    assert decode(batch) == whole
    tried = len(small.seen)
    assert decode(batch) == whole
    assert max(small.seen[tried:]) <= rows, "the size that fits is remembered"


def test_parts_hold_their_own_tiles_alone(model, batch):
    tiles = []
    PartsThatFit(lambda part: tiles.append(len(part.pixel_values)) or [0] * len(part.ends))(batch)
    small = Memory(model, 1)
    small.answers = lambda part: tiles.append(len(part.pixel_values)) or [0] * len(part.ends)
    PartsThatFit(small)(batch)
    assert tiles[0] == len(batch.pixel_values) and tiles[3] == tiles[6] == 0 and max(tiles[1:]) < tiles[0]


def test_one_sequence_that_does_not_fit_is_refused_with_what_helps(model, batch):
    with pytest.raises(ConfigError, match=r"questions of one sequence.*nearest: a smaller evaluate\.batch_size"):
        PartsThatFit(Memory(model, 0))(batch)


def test_a_prompt_token_of_the_largest_model_takes_its_keys_and_values_in_all_layers(processor):
    """2 x 24 layers x 32 heads x 64 values x 2 bytes, and the work of one layer."""
    with torch.device("meta"):
        model = Idefics3ForConditionalGeneration(build_config("random-2.2b", processor)).bfloat16()
    assert 2 * 24 * 32 * 64 * 2 < bytes_of_token(model) < 1.6 * 2 * 24 * 32 * 64 * 2


def test_the_batch_of_an_evaluation_is_bounded_by_the_least_free_memory(monkeypatch, model):
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (2 * gib, 24 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: 3 * gib)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: 1 * gib)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    least = 1000

    def of_two_workers(values, own):
        values[:] = [own, least]

    monkeypatch.setattr(dist, "all_gather_object", of_two_workers)
    assert most_tokens(model, torch.device("cuda")) == least
    least = 2**60
    assert most_tokens(model, torch.device("cuda")) == int(0.8 * 4 * gib / bytes_of_token(model))
    assert most_tokens(model, torch.device("cpu")) is None
