"""The README of the data holds what the code does: every format is listed, and every example row can be read."""

import json
import re
from pathlib import Path

import pytest

from smolray.config import DataConfig, ImageConfig, ModelConfig, load_config
from smolray.data import formats
from smolray.data.encode import Encoder
from smolray.data.formats.images import ImageReader
from smolray.data.formats.layouts import parse
from smolray.data.formats.registry import FORMATS
from smolray.data.processor import load_processor
from smolray.data.tiles import Tiler
from tests.offline import picture
from tests.real import real_processor

pytestmark = pytest.mark.seconds

README = (Path(formats.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.search(r"```json\n(.*?)```", README, re.DOTALL)[1].splitlines()


def test_every_format_is_listed_with_its_suffixes():
    table = README.split("## Formats")[1].split("\n## ")[0]
    listed = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", table, re.MULTILINE))
    assert list(listed) == list(FORMATS)
    assert all(f"`{suffix}`" in listed[f.name] for f in FORMATS.values() for suffix in f.suffixes)


@pytest.mark.parametrize("line", EXAMPLES)
def test_every_example_row_can_be_read(tmp_path, line):
    (tmp_path / "red.png").write_bytes(picture(8, 6))
    images = ImageReader(str(tmp_path), str(tmp_path), 100)
    samples = parse(json.loads(line), "row", DataConfig(), images).samples
    assert samples and all(bool(s.images) == ("image" in line) for s in samples)


def test_every_reason_of_the_quarantine_is_listed():
    reasons = set()
    for path in Path(formats.__file__).parents[1].rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        reasons |= set(re.findall(r'SampleError\(\s*"(\w+)"|reason="(\w+)"', text))
    named = {name for pair in reasons for name in pair if name}
    assert named <= set(re.findall(r"`(\w+)`", README)) and len(named) > 12


def test_images_have_the_tiles_and_tokens_that_the_table_says(tmp_path):
    processor = load_processor(ModelConfig(path=str(real_processor("smolvlm-256m", tmp_path / "model"))))
    stock, ours = (Encoder(processor, DataConfig(), ImageConfig(upscale=upscale)) for upscale in (True, False))
    table = README.split("## Images")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\d+) x (\d+) \| (.*?) \| (.*?) \|$", table, re.MULTILINE)
    assert len(rows) == 3
    for width, height, *said in rows:
        grids = [encoder.tiler.grid(int(width), int(height)) for encoder in (stock, ours)]
        counted = [(grid.tiles, len(ours.image_block(grid))) for grid in grids]
        assert said == [f"{tiles} tile{'s' * (tiles > 1)}, {tokens} tokens" for tiles, tokens in counted]


@pytest.mark.parametrize("size", [(1, 1), (320, 240), (640, 480), (200, 900), (5000, 4000)])
def test_the_setting_that_makes_stock_calls_exact_gives_at_most_5_tiles(tmp_path, size):
    model = ModelConfig(path=str(real_processor("smolvlm-256m", tmp_path / "model")))
    setting = re.search(r"`(image\.upscale=true image\.longest_edge=\d+)`", README)[1]
    config = load_config(None, [f"model.path={model.path}", *setting.split()])
    tiler = Tiler(load_processor(model).image_processor, config.image)
    assert tiler.grid(*size).tiles <= 5
    assert tiler.target(*size) == 1024
