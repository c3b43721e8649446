"""The micro-batches that the planner expects are those an epoch's plan lays."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from smolray.config import DataConfig, ImageConfig, ModelConfig, RunConfig, TrainConfig
from smolray.data.encode import Encoder
from smolray.data.index import index_shard
from smolray.data.plan import PlanLimits, build_epoch
from smolray.data.processor import load_processor
from smolray.data.shards import read_manifest
from smolray.data.tiles import Grid
from smolray.planner.model_files import known_shape, shape_of
from smolray.planner.statistics import DataStatistics, Row, assumed_tiles, packed_tokens
from tests.offline import asked, encoder_of
from tests.real import MODELS, real_processor
from tests.shards import vqa_rows, write_shards

pytestmark = pytest.mark.seconds


@pytest.fixture(scope="module")
def index(tmp_path_factory, processor):
    folder = str(tmp_path_factory.mktemp("shards"))
    write_shards(folder, vqa_rows("train", 120))
    encoder = encoder_of(processor, {"longest_edge": 128}, max_length=4096)
    return pa.concat_tables(
        [index_shard(folder, f.name, i, encoder) for i, f in enumerate(read_manifest(folder).files)]
    )


def config_of(packing: str, micro_batch: int, tokens: int | None = None) -> RunConfig:
    return RunConfig(
        data=DataConfig(packing=packing, max_length=4096),
        train=TrainConfig(per_device_train_batch_size=micro_batch, micro_batch_tokens=tokens),
    )


@pytest.mark.parametrize("packing", ["none", "image", "full"])
@pytest.mark.parametrize("micro_batch", [1, 4, 16, 64])
def test_mean_and_largest_micro_batch_are_those_of_the_epoch(index, packing, micro_batch):
    config = config_of(packing, micro_batch)
    mean, largest = DataStatistics.from_index(index).loads(config, micro_batch)
    plans = [build_epoch(index, PlanLimits.of(config), seed=0, epoch=e) for e in range(3)]
    tokens, labels = np.concatenate([p.tokens for p in plans]), np.concatenate([p.label_tokens for p in plans])
    assert mean.samples == pytest.approx(sum(p.samples for p in plans) / sum(map(len, plans)), rel=0.1)
    assert mean.tokens == pytest.approx(tokens.mean(), rel=0.1)
    assert mean.label_tokens == pytest.approx(labels.mean(), rel=0.1)
    assert largest.tokens >= tokens.max() * 0.999, "no micro-batch of the epoch is larger than the largest"
    assert largest.tokens <= tokens.max() * 2.5 + 4096 * (packing != "none")


def test_a_limit_of_tokens_is_kept(index):
    config = config_of("image", 64, tokens=4096)
    mean, largest = DataStatistics.from_index(index).loads(config, 64)
    assert mean.tokens <= largest.tokens <= 4096


def test_totals_are_those_of_the_index(index):
    statistics = DataStatistics.from_index(index)
    kept = index["label_tokens"].to_numpy() > 0
    assert statistics.samples == int(kept.sum())
    assert statistics.label_tokens_per_sample == pytest.approx(index["label_tokens"].to_numpy()[kept].mean())
    assert statistics.most_tiles == index["tiles"].to_numpy().max()


def test_nothing_to_train_on_is_said(index):
    empty = index.set_column(index.column_names.index("tokens"), "tokens", [np.zeros(len(index), np.int32)])
    with pytest.raises(ValueError, match="none of the"):
        DataStatistics.from_index(empty)


def test_fewer_tiles_take_their_tokens_with_them():
    shape = replace(known_shape("random-256m"), tokens_around_tile=10.0)
    row = Row(13, 8 + 13 * 74, (8 + 13 * 74 + 20,) * 3, (4,) * 3)
    statistics = DataStatistics((row,), packed_tokens(row), 13)
    fewer = statistics.with_max_tiles(5, shape)
    assert (fewer.most_tiles, fewer.rows[0].tiles, fewer.rows[0].prefix) == (5, 5, 8 + 5 * 74)
    assert fewer.longest == statistics.longest - 8 * 74


@pytest.mark.parametrize("name", MODELS)
def test_images_of_published_models_have_the_tokens_that_the_planner_expects(name, tmp_path):
    model = ModelConfig(path=str(real_processor(name, tmp_path / name)))
    shape, encoder = shape_of(model), Encoder(load_processor(model), DataConfig(), ImageConfig())
    for grid in (Grid(0, 0), Grid(2, 2), Grid(3, 4), Grid(4, 4)):
        assert grid.tiles * shape.tokens_with_marks == pytest.approx(len(encoder.image_block(grid)), rel=0.04)
    assert 13 * shape.tokens_with_marks == pytest.approx(len(encoder.image_block(Grid(3, 4))))


@pytest.mark.parametrize("name", MODELS)
def test_a_row_of_unprepared_data_has_the_tokens_of_a_published_model(name, tmp_path):
    model = ModelConfig(path=str(real_processor(name, tmp_path / name)))
    (row,) = DataStatistics.default(RunConfig(model=model), shape_of(model)).rows
    encoder = Encoder(load_processor(model), DataConfig(), ImageConfig())
    question = asked("What is in the middle of the picture?", "a small dog")
    (encoded,) = encoder.branches(question, [encoder.tiler.grid(640, 480)])
    assert row.tiles == encoder.tiler.grid(640, 480).tiles
    assert row.lengths[0] == pytest.approx(len(encoded.input_ids), rel=0.05)


@pytest.mark.parametrize(
    ("image", "tiles"),
    [({}, 5), ({"upscale": True}, 13), ({"longest_edge": 512}, 1), ({"upscale": True, "max_tiles": 7}, 7)],
)
def test_data_that_are_not_prepared_are_tiled_as_the_run_says(image, tiles):
    config, shape = RunConfig(image=ImageConfig(**image)), known_shape("random-256m")
    assert assumed_tiles(config, shape) == tiles
    assert DataStatistics.default(config, shape).assumed


def test_packing_shares_tiles_between_the_questions_of_an_image():
    shape = known_shape("random-256m")
    by_packing = {}
    for packing in ("none", "image"):
        config = config_of(packing, 20)
        by_packing[packing] = DataStatistics.default(config, shape).loads(config, 20)[0]
    assert by_packing["none"].tiles == by_packing["image"].tiles == 20, "a tile is computed once a micro-batch"
    assert by_packing["image"].tokens < by_packing["none"].tokens / 3
    assert by_packing["image"].mask > 0 and by_packing["none"].mask == 0
