"""The README of the data holds what the code does: every format is listed, and every example row can be read."""

import json
import re
from pathlib import Path

import pytest

from smolray.config import DataConfig
from smolray.data import formats
from smolray.data.formats.images import ImageReader
from smolray.data.formats.layouts import parse
from smolray.data.formats.registry import FORMATS
from tests.offline import picture

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
