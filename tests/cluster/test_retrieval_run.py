"""A run of method=retrieval through Ray Data and Ray Train, and a search with it: captions of easy-vqa's images as a
person would give them.
"""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from smolray import storage
from smolray.cli.app import app
from smolray.data.formats.layouts import CAPTION_PROMPT
from smolray.launch.driver import launch_run
from smolray.run.events import read_events
from tests.cluster.test_train import assert_every_sample_once
from tests.shards import captioned, vqa_rows


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """Folder with train.parquet and test.parquet (image, caption) and the test images as files."""
    folder = tmp_path_factory.mktemp("captions")
    (folder / "photos").mkdir()
    for split, images in (("train", 90), ("test", 30)):
        rows = captioned(vqa_rows(split, images))
        records = [{"image": row.images[0], "caption": row.conversations[0].answers[0]} for row in rows]
        pq.write_table(pa.Table.from_pylist(records), folder / f"{split}.parquet")
    for number, record in enumerate(records):
        (folder / "photos" / f"{number}.png").write_bytes(record["image"])
    return folder


@pytest.mark.slow
def test_a_run_learns_to_search_and_its_index_answers(make_run, captions):
    config = make_run(
        "finder", "method=retrieval", f"data.train={captions}/train.parquet", f"data.validation={captions}/test.parquet"
    )
    result = launch_run(config)
    assert result["status"] == "finished"
    found = result["metrics"]["mean_average_precision"]["overall"]
    assert 0 < found["value"] <= 1 and found["samples"] == result["accuracy_counts"]["overall"]
    assert "blind_baseline" not in result, "a search has no answer to guess"
    assert [e["in_batch_accuracy"] for e in read_events(config.run_dir) if e["event"] == "step"]
    assert_every_sample_once(config)
    index = f"{config.run_dir}/index"
    options = ["--storage", config.storage, "--batch-size", "8", "--workers", "1"]  # more than a batch: over Ray
    done = CliRunner().invoke(
        app, ["search", "build", "finder", str(captions / "photos"), "resources.use_gpu=no", "--out", index, *options]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(storage.read_bytes(f"{index}/index.json"))["prompt"] == CAPTION_PROMPT, "as in training"
    done = CliRunner().invoke(app, ["search", "query", index, "a blue circle", "--top", "3"])
    assert done.exit_code == 0 and done.output.count(".png") == 3, done.output
