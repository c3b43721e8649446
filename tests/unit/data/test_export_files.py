"""Processor files of an export: the base model's own, with the image size that training used most."""

import io
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from smolray.config import RunConfig
from smolray.data.export_files import COPIED, StockImages, image_note, stock_images, token_note, write_processor
from smolray.data.processor import load_processor
from smolray.data.tiles import Tiler
from tests.offline import asked, picture, shard_row
from tests.real import MODELS, golden_ids, real_processor
from tests.shards import write_shards
from tests.unit.data.test_tiles import stock_tiles

pytestmark = pytest.mark.seconds

SMALL, PHOTO, LARGE = (64, 64), (640, 480), (2000, 1500)


@pytest.fixture(scope="module", params=MODELS)
def base(request, tmp_path_factory):
    """The folder of a published model's processor files."""
    return real_processor(request.param, tmp_path_factory.mktemp("base") / request.param)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The same of the first model."""
    return real_processor(MODELS[0], tmp_path_factory.mktemp("first") / "base")


def run_config(tmp_path, base, sizes, **image) -> RunConfig:
    rows = [shard_row([picture(*size, seed=i)], asked("what?", "this")) for i, size in enumerate(sizes)]
    shards = write_shards(str(tmp_path / "shards"), rows)
    return RunConfig(name="run", storage=str(tmp_path), model={"path": str(base)}, data={"train": shards}, image=image)


def written(config, tmp_path) -> tuple[StockImages, dict]:
    """The settings of an export and the preprocessor_config.json that has them."""
    stock, folder = stock_images(config), tmp_path / "out"
    folder.mkdir()
    write_processor(config, stock, folder)
    return stock, json.loads((folder / "preprocessor_config.json").read_text())


def test_tokenizer_and_template_files_are_the_base_models_own(tmp_path, base):
    config = run_config(tmp_path, base, [SMALL])
    written(config, tmp_path)
    for name in {*COPIED, "processor_config.json"}:
        assert (tmp_path / "out" / name).exists() == (base / name).exists(), name
        if (base / name).exists():
            assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes(), name


def test_the_image_size_is_all_that_changes_in_the_processors_file(tmp_path, base):
    _, record = written(run_config(tmp_path, base, [SMALL]), tmp_path)
    before = json.loads((base / "preprocessor_config.json").read_text())
    assert record == before | {"size": before["max_image_size"]}
    assert record["processor_class"] in ("Idefics3Processor", "SmolVLMProcessor")
    assert ("video_sampling" in record) == (record["processor_class"] == "SmolVLMProcessor")


def test_settings_of_the_base_model_leave_its_file_as_it_is(tmp_path, base):
    written(run_config(tmp_path, base, [PHOTO], upscale=True), tmp_path)
    name = "preprocessor_config.json"
    assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


IMAGES = {
    "small images stay small": ({}, [SMALL], 1, True),
    "photographs are not enlarged": ({}, [PHOTO], 2, True),
    "large images": ({}, [LARGE], 4, True),
    "enlarged": ({"upscale": True, "longest_edge": 1536}, [SMALL, PHOTO, LARGE], 3, True),
    "at most 5 tiles": ({"upscale": True, "max_tiles": 5}, [PHOTO, LARGE], 2, True),
    "one tile": ({"max_tiles": 1}, [SMALL, PHOTO, LARGE], 1, False),
}


@pytest.mark.parametrize("case", IMAGES)
def test_a_stock_call_makes_the_tiles_that_training_saw(tmp_path, first, case):
    image, sizes, tiles_an_edge, splitting = IMAGES[case]
    config = run_config(tmp_path, first, sizes, **image)
    stock, record = written(config, tmp_path)
    assert record["size"] == {"longest_edge": 512 * tiles_an_edge} and record["do_image_splitting"] == splitting
    assert stock.same == stock.images == len(sizes) and "as training did" in image_note(config, stock)

    processor = Idefics3ImageProcessorPil.from_pretrained(tmp_path / "out")
    tiler = Tiler(load_processor(config.model).image_processor, config.image)
    for size in sizes:
        drawn = picture(*size)
        got, want = stock_tiles(processor, drawn)[0], tiler.tiles(drawn)
        assert got.shape == want.shape and (got == want).all()


def test_most_training_images_decide_and_the_card_names_the_rest(tmp_path, first):
    config = run_config(tmp_path, first, [PHOTO, PHOTO, PHOTO, LARGE])
    stock, record = written(config, tmp_path)
    assert stock == StockImages(longest_edge=1024, splitting=True, images=4, same=3)
    assert record["size"] == {"longest_edge": 1024}
    note = image_note(config, stock)
    assert "For 75% of 4 training images" in note and "Training did not enlarge small images" in note


def test_data_without_images_keep_the_size_of_the_base_model(tmp_path, first):
    rows = [shard_row([], asked("what?", "this", images=0))]
    shards = write_shards(str(tmp_path / "shards"), rows)
    config = RunConfig(name="run", storage=str(tmp_path), model={"path": str(first)}, data={"train": shards})
    assert stock_images(config) == StockImages(longest_edge=2048, splitting=True, images=0, same=0)


def test_a_processor_in_one_file_of_transformers_5_is_changed_there(tmp_path, tiny_path):
    config = run_config(tmp_path, tiny_path, [(64, 64), (128, 96)], longest_edge=128, upscale=True)
    stock, folder = stock_images(config), tmp_path / "out"
    folder.mkdir()
    shutil.copy(Path(tiny_path, "config.json"), folder)
    write_processor(config, stock, folder)
    record = json.loads((folder / "processor_config.json").read_text())
    assert record["image_processor"]["size"] == {"longest_edge": 128} and record["processor_class"]
    assert not (folder / "preprocessor_config.json").exists()
    image = Image.open(io.BytesIO(picture(128, 96)))
    processor = load_processor(config.model.replace({"path": str(folder)})).image_processor
    assert len(processor.preprocess([[image]], return_tensors=None)["pixel_values"][0]) == 5


def test_the_card_warns_where_auto_tokenizer_gives_other_ids(base):
    want = golden_ids(base.name)["with_added_tokens"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    altered = any(tokenizer(text, add_special_tokens=False)["input_ids"] != ids for text, ids in want.items())
    note = token_note(base)
    assert ("PreTrainedTokenizerFast.from_pretrained(folder)" in note) == altered
    assert ("pre_tokenizer differ" in note) == altered
    assert altered == (base.name[:8] == "smolvlm-"), "transformers alters the tokenizers of Idefics3 alone"


def test_files_of_a_hub_model_come_from_the_cache(tmp_path, monkeypatch):
    cached = tmp_path / "hub" / "models--org--smolvlm"
    base = real_processor(MODELS[0], cached / "snapshots" / "abc123")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    config = run_config(tmp_path, "org/smolvlm", [SMALL])
    _, record = written(config, tmp_path)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert record["size"] == {"longest_edge": 512}
