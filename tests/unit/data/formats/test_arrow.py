"""Arrow files and folders of save_to_disk: every row is read once, and a damaged file is refused."""

import datasets
import pyarrow as pa
import pytest

from smolray.config import DataConfig
from smolray.data.formats.discover import list_read_tasks, read_rows, resolve
from smolray.data.formats.source import SourceError
from tests.offline import picture

TABLE = pa.table({"question": [f"q{n}" for n in range(100)], "answer": ["a"] * 100})


def records_of(source):
    tasks = list_read_tasks(resolve(str(source), DataConfig()))
    return [row.record for task in tasks for row in read_rows(task) if not row.reason]


def write(path, new):
    with new(path, TABLE.schema) as writer:
        writer.write_table(TABLE, 10)
    return path


def test_a_data_set_saved_to_disk_is_read_without_its_caches(tmp_path):
    features = datasets.Features(
        image=datasets.Image(), question=datasets.Value("string"), label=datasets.ClassLabel(names=["cat", "dog"])
    )
    rows = {"image": [{"bytes": picture(8, 6), "path": None}] * 4, "question": ["q"] * 4, "label": [0, 1, 0, -1]}
    made = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(train=made, test=made).save_to_disk(tmp_path / "ds")
    (tmp_path / "ds" / "train" / "cache-123.arrow").write_bytes(b"rest")

    found = records_of(f"{tmp_path}/ds#train")
    assert [r["label"] for r in found] == ["cat", "dog", "cat", None]
    assert found[0]["image"]["bytes"] == picture(8, 6)
    with pytest.raises(SourceError, match=r"several splits \(test, train\)"):
        records_of(tmp_path / "ds")
    next((tmp_path / "ds" / "train").glob("data-*.arrow")).unlink()
    with pytest.raises(SourceError, match=r"state\.json lists data-00000-of-00001\.arrow, which is not there"):
        records_of(f"{tmp_path}/ds#train")


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
def test_streams_and_files_of_arrow_are_read_whole_or_refused(tmp_path, new):
    path = write(tmp_path / "x.arrow", new)
    assert records_of(path) == TABLE.to_pylist()
    content = path.read_bytes()
    for damaged in (content[:-8], content[: len(content) // 2], content[:3], content + b"more than that"):
        path.write_bytes(damaged)
        with pytest.raises(SourceError, match=r"x\.arrow is damaged: "):
            records_of(path)
