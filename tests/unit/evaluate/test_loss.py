"""The validation loss that a search may go by is the mean over all trained tokens, whatever they are packed with and
however they are batched.
"""

import pytest
import torch
import torch.distributed as dist

from smolray.config import ModelConfig
from smolray.data.collate import Group, collate_training
from smolray.data.tiles import image_size
from smolray.evaluate.loss import mean_loss
from smolray.model.load import load_model
from tests.offline import asked, encoder_of, picture, shard_row


@pytest.fixture
def alone(tmp_path):
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("packing", ["none", "full"])
def test_the_loss_is_that_of_each_answer_alone(alone, tiny_path, processor, packing):
    model = load_model(ModelConfig(path=tiny_path, dtype="float32")).train()
    encoder = encoder_of(processor, {"longest_edge": 128}, max_length=4096, packing=packing)
    rows = [
        shard_row([picture(64, 64)], asked("what shape?", "a circle"), asked("what colour is it?", "blue or so")),
        shard_row([picture(120, 60, seed=1)], asked("is there a box?", "yes")),
    ]
    groups = (
        [Group(r, tuple(range(len(r.conversations)))) for r in rows]
        if packing == "full"
        else [Group(r, (c,)) for r in rows for c in range(len(r.conversations))]
    )
    losses = []
    for row in rows:
        grids = [encoder.tiler.grid(*image_size(image)) for image in row.images]
        pixels = (
            (torch.cat([torch.from_numpy(encoder.tiler.tiles(image)) for image in row.images]).float() / 255 - 0.5)
            / 0.5
        )[None]
        for conversation in row.conversations:
            (one,) = encoder.branches(conversation, grids)
            ids = torch.from_numpy(one.input_ids.astype("int64"))[None]
            with torch.no_grad():
                logits = (
                    model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels)
                    .logits[0]
                    .float()
                )
            trained = torch.from_numpy(one.trained.nonzero()[0])
            losses += (-torch.log_softmax(logits[trained - 1], -1).gather(1, ids[0, trained][:, None])[:, 0]).tolist()
    model.train()
    found = mean_loss(model, [collate_training([g], encoder) for g in groups], len(losses), torch.device("cpu"))
    assert found == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert model.training, "it continues training as before"
