"""Published models: what smolray makes of a conversation and its images is what the stock processor makes of them."""

import random

import numpy as np
import pytest

from smolray.config import DataConfig, ImageConfig, ModelConfig
from smolray.data.encode import Encoder
from smolray.data.processor import load_processor
from smolray.data.sample import Conversation
from smolray.data.tiles import Grid, image_size
from tests.offline import asked, message, picture
from tests.real import MODELS, golden_ids, real_processor
from tests.unit.data.test_encode import conversations, oracle
from tests.unit.data.test_tiles import stock_tiles

pytestmark = pytest.mark.seconds

SIZES = [(512, 512), (640, 480), (320, 240), (1024, 768), (200, 900), (2048, 600), (1, 1), (1700, 2200)]


@pytest.fixture(scope="module", params=MODELS)
def published(request, tmp_path_factory):
    """(name, stock processor, encoder that enlarges small images as the stock processor does)"""
    folder = real_processor(request.param, tmp_path_factory.mktemp(request.param))
    processor = load_processor(ModelConfig(path=str(folder)))
    return request.param, processor, Encoder(processor, DataConfig(max_length=100_000), ImageConfig(upscale=True))


def same_tokens(stock, encoder, conversation, images):
    grids = [encoder.tiler.grid(*image_size(image)) for image in images]
    (encoded,) = encoder.branches(conversation, grids)
    assert encoded.input_ids.tolist() == oracle(stock, conversation, images), conversation


def with_numbers(seed):
    """Texts in which tokenizers differ: digits after blanks and blank lines, tables, fractions."""
    rng = random.Random(seed)
    texts = [t for t in golden_ids(MODELS[0])["as_text"] if "<" not in t and t == t.strip()]
    yield asked(rng.choice(texts), rng.choice(texts)), 1
    yield asked(rng.choice(texts), rng.choice(texts), images=2), 2


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_tiles_are_those_of_the_stock_processor(published, size):
    _, stock, encoder = published
    image = picture(*size, seed=size[0])
    want, rows, columns = stock_tiles(stock.image_processor, image)
    grid = encoder.tiler.grid(*size)
    assert (grid.rows, grid.columns) == (rows, columns)
    np.testing.assert_array_equal(encoder.tiler.tiles(image), want)


def test_tokens_are_those_of_the_stock_processor(published):
    _, stock, encoder = published
    for number, (conversation, count) in enumerate([*conversations(0), *with_numbers(0)]):
        same_tokens(stock, encoder, conversation, [picture(*SIZES[1], seed=10 * number + i) for i in range(count)])


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_tokens_of_20_conversations_are_those_of_the_stock_processor(published, size):
    _, stock, encoder = published
    pairs = [pair for seed in range(5) for pair in (*conversations(seed), *with_numbers(seed))]
    assert len(pairs) >= 20
    for number, (conversation, count) in enumerate(pairs):
        same_tokens(stock, encoder, conversation, [picture(*size, seed=10 * number + i) for i in range(count)])


TURNS = Conversation(
    "turns",
    (
        message("system", "Answer in one word."),
        message("user", "Hello!"),
        message("assistant", "Hi."),
        message("user", "Look:", None),
        message("assistant", "A cat."),
    ),
)
GOLDEN = {
    "one tile": (asked("What color is the bus?", "red"), Grid(0, 0)),
    "2 x 3 tiles": (asked("What color is the bus?", "red"), Grid(2, 3)),
    "system, text first, second turn": (TURNS, Grid(1, 2)),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_conversations_have_the_golden_ids(published, name):
    model, _, encoder = published
    conversation, grid = GOLDEN[name]
    (encoded,) = encoder.branches(conversation, [grid])
    assert encoded.input_ids.tolist() == golden_ids(model)["conversations"][name]["ids"]


def test_a_trained_turn_ends_with_the_published_end_of_utterance(published):
    _, stock, encoder = published
    assert encoder.end_of_turn == stock.tokenizer.convert_tokens_to_ids("<end_of_utterance>")
