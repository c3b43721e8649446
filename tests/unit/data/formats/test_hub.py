"""A hub data set is read through `datasets`; a bad value costs its row, not the data set."""

import json

import pyarrow as pa
import pyarrow.parquet as pq

from smolray.config import DataConfig
from smolray.data.formats.discover import list_read_tasks, read_rows, resolve


def test_a_class_label_outside_its_range_costs_its_row(tmp_path):
    features = {
        "question": {"dtype": "string", "_type": "Value"},
        "label": {"names": ["cat", "dog"], "_type": "ClassLabel"},
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"question": ["a", "b", "c", "d", "e"], "label": pa.array([0, 1, 7, -1, -2], pa.int64())})
    (tmp_path / "set").mkdir()
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "set" / "train.parquet")

    data = DataConfig(format="hub", split="train")
    rows = [row for task in list_read_tasks(resolve(str(tmp_path / "set"), data)) for row in read_rows(task)]
    assert [row.record.get("label") for row in rows] == ["cat", "dog", None, None, None]
    assert [row.reason for row in rows] == ["", "", "wrong_type", "", "wrong_type"]
    assert rows[2].message == "column 'label': label 7 is none of its 2 class labels"
