"""Whatever the rows are: rows in = kept + quarantined, conversations = trained + left out, images in = placed + told,
and what `preview` shows is what is trained.
"""

import io
import json
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from smolray.cli.preview_samples import preview_item
from smolray.config import DataConfig
from smolray.data.first_rows import first_rows
from smolray.data.formats.discover import list_read_tasks, resolve
from smolray.data.formats.source import SourceError
from smolray.data.index import add_lengths, index_shard
from smolray.data.shards import decode_rows, write_shards
from smolray.data.shuffle import duplicates, read_blocks, repeated_ids, run_read_task, write_shard
from smolray.data.staging import Staging
from smolray.data.tiles import image_size
from smolray.run.account import DataAccount
from tests.offline import encoder_of

PICTURES = ["red.png", "blue.png", "tall.png"]
DATA = DataConfig(max_bad_fraction=1, text_only_ok=True, ignore_columns=("note",))

pictures = st.sampled_from([*PICTURES, *PICTURES, None, "", "gone.png"])
texts = st.sampled_from(["a box", "", " ", "two\n\nlines", "say <image> here", "<image>\nwhat?", None, "word " * 60])
numbers = st.sampled_from([4, 1.0, 2.5, True])
answers = st.one_of(texts, numbers, st.lists(texts, max_size=3))
roles = st.sampled_from(["user", "assistant", "User", "system", "tool"])
turns = st.lists(st.fixed_dictionaries({"role": roles, "content": texts}), max_size=4)
good_turns = st.just([{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a box"}])
rows = st.one_of(
    st.fixed_dictionaries({"image": pictures, "question": texts, "answer": answers}, optional={"note": texts}),
    st.fixed_dictionaries({"images": st.lists(pictures, max_size=3), "messages": st.one_of(turns, good_turns)}),
    st.fixed_dictionaries({"image": pictures, "caption": texts}),
    st.fixed_dictionaries({"question": texts, "answer": answers}, optional={"id": st.sampled_from(["a", "b", 7])}),
)


@pytest.fixture(scope="module")
def encoder(processor):
    return encoder_of(processor, {"longest_edge": 64}, max_length=64)


def source_of(folder: Path, records: list[dict]) -> str:
    (folder / "data").mkdir()
    for number, name in enumerate(PICTURES):
        sink = io.BytesIO()
        Image.new("RGB", (8 + 30 * number, 8), (number, 0, 0)).save(sink, "PNG")
        (folder / "data" / name).write_bytes(sink.getvalue())
    (folder / "data" / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder / "data")


def prepared(source: str, folder: Path):
    """All that prepare does with a source, in this process: shard rows, account and the quarantined rows."""
    staging = Staging(str(folder / "staging"), str(folder / "out"))
    tasks = list_read_tasks(resolve(source, DATA), task_bytes=400)
    results = [run_read_task(task, n, staging, DATA, seed=0) for n, task in enumerate(tasks)]
    blocks = np.concatenate([read_blocks(staging, n) for n in range(len(tasks))])
    record = write_shard(0, 1, blocks, repeated_ids(staging, len(tasks)), staging)
    kept = decode_rows(pq.read_table(f"{staging.out}/{record['file']['name']}")) if record["file"] else []
    said = [r for file in Path(staging.out).rglob("quarantine/*.parquet") for r in pq.read_table(file).to_pylist()]
    account = type(results[0].rows).total(result.rows for result in results)
    return (
        kept,
        DataAccount("s", sum(len(r.conversations) for r in kept), account, duplicates(staging, len(tasks))),
        said,
    )


def values_of(record: dict) -> list:
    """The images that a record names."""
    value = record.get("images", record.get("image"))
    return [v for v in (value if isinstance(value, list) else [value]) if v]


def check(records: list[dict], encoder, folder: Path) -> None:
    kept, account, said = prepared(source := source_of(folder, records), folder)

    assert account.rows.rows == len(records) == account.rows.with_images + account.rows.text_only + len(said)
    assert Counter(r["reason"] for r in said) == account.rows.quarantined
    told = {r["row"] for r in said}
    trained = [(row, c) for row in kept for c in row.conversations]
    rows_in = Counter(n for n in range(len(records)) if n not in told)
    assert len(trained) >= len(rows_in), "a row that is not told is trained"

    named = sum(len(values_of(record)) for n, record in enumerate(records) if n not in told)
    placed = sum(len(row.images) for row, c in trained if "/" not in c.id.partition("#")[2] or c.id.endswith("/1"))
    assert placed == named, "pictures of rows that are kept are all placed"
    for row, c in trained:
        assert sum(p.type == "image" for m in c.messages for p in m.content) == len(row.images)

    if not kept:
        return
    shards = write_shards(str(folder / "shards"), kept, rows_per_file=len(kept))
    account = add_lengths(account, index_shard(shards, "shard-00000.parquet", 0, encoder), encoder.max_length)
    fits = [bool(encoder.branches(c, [encoder.tiler.grid(*image_size(i)) for i in row.images])) for row, c in trained]
    assert account.conversations == len(trained) and account.too_long == fits.count(False)

    try:
        shown = first_rows(source, DATA, len(records))
    except SourceError as error:
        assert "is not used" in str(error)
        return
    assert shown.account.rows == account.rows and shown.account.duplicates == account.duplicates
    assert Counter(bad.reason for bad in shown.left_out) == account.rows.quarantined
    for items in zip(*(sorted(seen(rows, encoder)) for rows in (shown.rows, kept)), strict=True):
        assert items[0] == items[1], "preview shows another sample than is trained"


def seen(rows, encoder):
    """What preview prints of each conversation, and what the loss counts of it; without ids, which repeats change."""
    for row in rows:
        for conversation in row.conversations:
            item = preview_item(row, conversation, encoder)
            grids = [encoder.tiler.grid(*image_size(image)) for image in row.images]
            branches = encoder.branches(conversation, grids)
            assert bool(branches) != item.note.startswith("left out")
            if branches:
                counted = encoder.tokenizer.decode(branches[0].input_ids[branches[0].trained])
                assert "".join(p.text for p in item.pieces if p.trained) == counted
            yield repr((item.pieces, item.tokens, item.images, item.note))


@settings(
    max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck]
)  # the same examples on every machine
@given(records=st.lists(rows, min_size=1, max_size=8))
def test_every_row_is_trained_or_told_and_previewed_as_trained(records, encoder):
    with tempfile.TemporaryDirectory() as folder:
        check(records, encoder, Path(folder))
