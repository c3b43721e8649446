"""The shuffle behind prepare, in one process: rows are gathered by images and counted by a sketch, ids are unique, and
the result does not depend on the cut.
"""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from smolray.config import DataConfig
from smolray.data import shuffle
from smolray.data import staging as staged_rows
from smolray.data.formats.discover import list_read_tasks, resolve
from smolray.data.prepare import prepare
from smolray.data.sample import Conversation, Message, Part, image_key
from smolray.data.shards import decode_rows
from smolray.data.shuffle import read_blocks, repeated_ids, run_read_task, total_bytes, write_shard
from smolray.data.staging import SKETCH_KEYS, Sketch, Staging, hash64

DATA = DataConfig()


def write_source(folder, pictures, questions):
    folder.mkdir()
    for n in range(pictures):
        Image.new("RGB", (1 + n % 50, 1 + n // 50)).save(folder / f"{n}.png")
    records = [{"image": f"{n % pictures}.png", "question": f"q{n}", "answer": "a", "id": n} for n in range(questions)]
    (folder / "x.jsonl").write_text("\n".join(map(json.dumps, records)))
    return str(folder)


def staged(source, out, task_bytes=2**28):
    staging = Staging(str(out / "staging"), str(out / "out"))
    tasks = list_read_tasks(resolve(source, DATA), task_bytes)
    for n, task in enumerate(tasks):
        run_read_task(task, n, staging, DATA, seed=0)
    return staging, len(tasks)


def written(staging, tasks, shards=1):
    blocks = np.concatenate([read_blocks(staging, n) for n in range(tasks)])
    files = [write_shard(n, shards, blocks, repeated_ids(staging, tasks), staging)["file"] for n in range(shards)]
    return [decode_rows(pq.read_table(f"{staging.out}/{f['name']}")) for f in files if f]


def test_at_most_64_conversations_share_a_row_in_source_order(tmp_path):
    staging, tasks = staged(write_source(tmp_path / "s", 1, 150), tmp_path, task_bytes=16 * 500)
    assert tasks > 5
    ((*rows,),) = written(staging, tasks)
    assert [len(row.conversations) for row in rows] == [64, 64, 22]
    assert len({(row.key, row.images) for row in rows}) == 1 and rows[0].images
    assert [c.id for row in rows for c in row.conversations] == [str(n) for n in range(150)]


def test_small_runs_and_blocks_give_the_same_shards_as_one_of_each(tmp_path, monkeypatch):
    source = write_source(tmp_path / "s", 40, 200)
    whole = written(*staged(source, tmp_path / "a"), shards=3)
    monkeypatch.setattr(staged_rows, "RUN_BYTES", 4000)
    monkeypatch.setattr(staged_rows, "BLOCK_BYTES", 500)
    staging, tasks = staged(source, tmp_path / "b", task_bytes=16 * 900)
    blocks = np.concatenate([read_blocks(staging, n) for n in range(tasks)])
    assert len(np.unique(blocks[["task", "run"]])) > 10 and len(blocks) > 40
    assert written(staging, tasks, shards=3) == whole
    assert sum(len(rows) for rows in whole) == 40


def test_a_slice_without_rows_writes_no_file(tmp_path):
    shards = written(*staged(write_source(tmp_path / "s", 2, 4), tmp_path), shards=50)
    assert sum(len(rows) for rows in shards) == 2 and 1 <= len(shards) <= 2


@pytest.mark.parametrize("keys", [300, 20_000])
def test_the_sketch_knows_the_bytes_of_distinct_rows_however_they_were_cut(keys, tmp_path):
    staging = Staging(str(tmp_path), str(tmp_path))
    truth = 0
    parts = [Sketch() for _ in range(3)]
    for key in range(keys):
        order, size = hash64(f"{key}".encode()), 1000 + key % 977
        truth += size + 3 * 7
        for part in parts:  # the same image in every task, with one conversation of 7 bytes in each
            part.add(order, size, 7)
    for n, part in enumerate(parts):
        (tmp_path / "tasks").mkdir(exist_ok=True)
        (tmp_path / "tasks" / f"task-{n:05d}.sketch").write_bytes(part.to_array().tobytes())
    estimate = total_bytes(staging, 3)
    assert estimate == truth if keys < SKETCH_KEYS else abs(estimate / truth - 1) < 0.1


def test_repeated_ids_are_found_in_any_number_of_passes(tmp_path):
    staging, rng = Staging(str(tmp_path), str(tmp_path)), np.random.default_rng(0)
    (tmp_path / "tasks").mkdir()
    hashes = rng.integers(0, 2**64, 1000, "u8")
    for n, part in enumerate((hashes[:600], hashes[500:], hashes[:0])):
        (tmp_path / "tasks" / f"task-{n:05d}.ids").write_bytes(part.tobytes())
    for rows_at_once in (2**24, 100):
        assert (repeated_ids(staging, 3, rows_at_once) == np.sort(hashes[500:600])).all()


def test_equal_text_only_rows_stay_two_rows_with_two_ids():
    conversation = Conversation(
        "7", (Message("user", (Part("text", "q"),)), Message("assistant", (Part("text", "a"),)))
    )
    key = image_key((), conversation)
    row = {"order": 5, "key": key, "conversation": conversation.to_json(), "images": None}
    repeated = np.array([hash64(b"7")], "u8")
    rows = list(
        shuffle._gather([row | {"origin": "1", "place": "x#1"}, row | {"origin": "2", "place": "x#2"}], repeated)
    )
    assert [[c.id for c in r.conversations] for r in rows] == [["7@x#1"], ["7@x#2"]]


def test_prepare_without_ray_says_so(tmp_path):
    import ray

    if ray.is_initialized():
        pytest.skip("this process has a Ray already")
    with pytest.raises(RuntimeError, match=r"prepare needs Ray: call ray.init\(\) first"):
        prepare(write_source(tmp_path / "s", 1, 1), str(tmp_path / "out"), DATA)


def test_quarantine_lists_the_place_of_a_row_and_its_own_id(tmp_path):
    folder = tmp_path / "s"
    folder.mkdir()
    records = [{"id": "mine", "question": "q", "answer": ""}, {"question": "q", "answer": " "}]
    (folder / "x.jsonl").write_text("\n".join(map(json.dumps, records)))
    staging, _ = staged(str(folder), tmp_path)
    listed = pq.read_table(staging.quarantine(0)).to_pylist()
    assert [(r["place"], r["id"], r["file"], r["row"]) for r in listed] == [
        ("x.jsonl#0", "mine", "x.jsonl", 0),
        ("x.jsonl#1", "x.jsonl#1", "x.jsonl", 1),
    ]
