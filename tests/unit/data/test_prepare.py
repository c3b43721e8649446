"""What prepare knows of earlier prepares of the same source."""

import os

from smolray import storage
from smolray.config import RunConfig
from smolray.data.prepare import inputs_before
from smolray.data.shards import MANIFEST, ShardManifest
from smolray.run.account import DataAccount, RowAccount


def prepared(config, fingerprint, source, inputs, age):
    """The manifest that an earlier prepare has left, `age` seconds ago."""
    manifest = ShardManifest(1, fingerprint, 1, 1, 0, {}, (), source=source, inputs=inputs)
    uri = storage.join(config.shards_dir, fingerprint, "train", MANIFEST)
    storage.write_bytes(uri, manifest.to_json().encode())
    os.utime(uri, (1e9 - age, 1e9 - age))


def test_the_files_of_a_source_are_those_of_its_newest_prepare(tmp_path):
    config = RunConfig(storage=str(tmp_path / "runs"), data={"train": "photos/*.jsonl"})
    assert inputs_before(config, "train") == 0
    prepared(config, "a", "photos/*.jsonl", 7, age=50)
    prepared(config, "b", storage.absolute("photos/*.jsonl"), 5, age=10)
    prepared(config, "c", "other/*.jsonl", 9, age=0)
    storage.write_bytes(storage.join(config.shards_dir, "d", "train", MANIFEST), b"{")
    assert inputs_before(config, "train") == 5 and inputs_before(config, "validation") == 0
    assert inputs_before(config.replace({"data.shards": str(tmp_path)}), "train") == 0


def test_fewer_files_than_before_are_told():
    rows = RowAccount(text_only=3)
    told = DataAccount("photos/*.jsonl", 3, rows, gone=2).lines("train")
    assert "train: photos/*.jsonl has 2 files fewer than when it was prepared before" in told
    assert not any("fewer" in line for line in DataAccount("photos/*.jsonl", 3, rows).lines("train"))
