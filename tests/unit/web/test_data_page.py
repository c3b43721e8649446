"""Prepared data: what became of its rows, with reasons, and how long its conversations are."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smolray.data.quarantine import QUARANTINE_SCHEMA
from smolray.data.sample import Conversation, Message, Part, ShardRow
from smolray.data.shards import write_shards
from smolray.web.data_page import length_bins
from tests.webpages import EVIL, Browser, site_of


@pytest.fixture
def root(tmp_path):
    return write_prepared(tmp_path / "runs")


def write_prepared(root):
    """Shards with a quarantine and an index, as prepare and a run leave them."""
    folder = root / "shards" / "abc" / "train"
    turns = tuple(Message(role, (Part("text", text),)) for role, text in (("user", "what?"), ("assistant", "a box")))
    write_shards(str(folder), [ShardRow("k", (), (Conversation("c", turns),))], source=f"data/{EVIL}")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(
        json.dumps(manifest | {"source": f"data/{EVIL}", "quarantined": {"corrupt_image": 1}})
    )
    (folder / "quarantine").mkdir()
    row = {"place": "a.jsonl:3", "id": "7", "reason": "corrupt_image", "message": EVIL, "file": "a.jsonl", "row": 3}
    pq.write_table(pa.Table.from_pylist([row], QUARANTINE_SCHEMA), folder / "quarantine" / "00000.parquet")
    pq.write_table(pa.table({"tokens": [10, 12, 0, 95]}), folder / "index-x.parquet")
    return root


def test_the_page_tells_what_was_left_out_and_why(root):
    browser = Browser(site_of(root))
    assert "corrupt" not in browser.get("/data").text and "data/&lt;script&gt;" in browser.get("/data").text
    text = browser.get("/data?folder=abc&part=train").text
    for words in ("corrupt_image 1", "a.jsonl:3", "1 of 1 conversations kept", "10 – 17"):
        assert words in text, words
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text


@pytest.mark.parametrize("query", ["folder=..&part=train", "folder=abc&part=../train", "folder=abc&part=x"])
def test_no_other_folder_is_read(root, query):
    assert Browser(site_of(root)).get(f"/data?{query}").status_code == 404


def test_without_data_the_page_says_so(tmp_path):
    assert "Nothing is prepared here yet" in Browser(site_of(tmp_path / "none")).get("/data").text


@pytest.mark.parametrize("lengths", [[5], [5, 5], list(range(1, 100)), [1, 10_000]])
def test_every_length_is_in_one_bin(lengths):
    bins = length_bins(lengths)
    assert sum(one.conversations for one in bins) == len(lengths) and len(bins) <= 12
    for low, high, count, _ in bins:
        assert count == sum(low <= length <= high for length in lengths)
