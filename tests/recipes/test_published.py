"""Published models at their full number of tiles: the loss is that of plain transformers on what the stock processor
makes, and packed training equals separate training, gradients included.
"""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from smolray.config import ModelConfig
from smolray.data.processor import load_processor
from smolray.data.tiles import decode
from smolray.model.load import load_model
from tests.losses import sft_sum
from tests.offline import asked, encoder_of, hf_messages, picture, shard_row
from tests.real import MODELS, real_model
from tests.unit.data.test_pack import apart, loss_and_gradients, whole

SIZES = {"17 tiles": (512, 512), "13 tiles": (640, 480), "one column": (100, 900)}
TALK = asked("What are these?\n\n1 bus, 22 cars", "a bus and 22 cars")
BOTH = asked("Which of them is older?", "The second.", images=2)


@pytest.fixture(scope="module", params=MODELS)
def published(request, tmp_path_factory):
    """(folder, stock processor, our model) of a published model with thin weights."""
    folder = real_model(request.param, tmp_path_factory.mktemp(request.param))
    model = load_model(ModelConfig(path=str(folder), dtype="float32")).train()
    return folder, load_processor(ModelConfig(path=str(folder))), model


def encoder(processor, packing):
    return encoder_of(processor, {"upscale": True}, max_length=100_000, packing=packing)


@pytest.mark.parametrize(
    "size", [pytest.param(size, marks=pytest.mark.slow if "tiles" in size else ()) for size in SIZES]
)
def test_the_loss_is_that_of_transformers_and_the_stock_processor(published, size):
    folder, stock, model = published
    plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    for conversation, count in ((TALK, 1), (BOTH, 2)):
        images = [picture(*SIZES[size], seed=i) for i in range(count)]
        (batch,) = apart([shard_row(images, conversation)], encoder(stock, "none"))
        text = stock.apply_chat_template(hf_messages(conversation))
        inputs = stock(text=[text], images=[[decode(image) for image in images]], return_tensors="pt")
        assert torch.equal(inputs.input_ids, batch.input_ids)

        labels = torch.full_like(inputs.input_ids, -100)
        labels[0, batch.target_positions + 1] = batch.target_ids
        with torch.no_grad():
            want = float(plain(**inputs, labels=labels).loss)
            got = float(sft_sum(model, batch)) / batch.label_tokens
        assert got == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("packing", [pytest.param("image", marks=pytest.mark.slow), "full"])
def test_packed_equals_separate_at_17_tiles_in_loss_and_gradients(published, packing):
    _, stock, model = published
    rows = [
        shard_row([picture(512, 512)], TALK, asked("How many?", "22"), asked("What colour?", "red and blue")),
        shard_row([], asked("Two and two?", "four", 0)),
    ]
    packed, separate = whole(rows, encoder(stock, packing)), apart(rows, encoder(stock, "none"))
    assert len(packed.tile_order) == 17

    loss, gradients = loss_and_gradients(model, [packed])
    want_loss, want = loss_and_gradients(model, separate)
    assert loss == pytest.approx(want_loss, rel=1e-6)
    norm = torch.sqrt(sum((g**2).sum() for g in want.values()))
    none = torch.zeros(())
    for name in want.keys() | gradients.keys():
        assert float((want.get(name, none) - gradients.get(name, none)).norm() / norm) < 1e-5, name
