"""Hostile input of thirty classes, each with eight seeds: a clear message, a quarantine row, or whole passage; no
crash, no silent loss.

Each case goes through what prepare's tasks run (read tasks -> sorted runs -> a shard), and every row is accounted for
in the end.
"""

import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from smolray.config import DataConfig
from smolray.data.formats.discover import list_read_tasks, resolve
from smolray.data.formats.source import SourceError
from smolray.data.prepare import check_layout
from smolray.data.shards import decode_rows
from smolray.data.shuffle import read_blocks, repeated_ids, run_read_task, write_shard
from smolray.data.staging import Staging
from tests.hostile import CLASSES

DATA = DataConfig(max_image_pixels=1_000_000)


def through(folder: Path, staging: Staging) -> tuple[int, list, Counter]:
    """Rows in, shard rows out, quarantined by reason: all that prepare does with a source, in this process."""
    tasks = list_read_tasks(resolve(str(folder), DATA), task_bytes=3000)
    check_layout(tasks, DATA)
    results = [run_read_task(task, n, staging, DATA, seed=0) for n, task in enumerate(tasks)]
    rows, bad = sum(r.rows.rows for r in results), Counter()
    for result in results:
        bad.update(result.rows.quarantined)
    if not tasks:
        return 0, [], bad
    blocks = np.concatenate([read_blocks(staging, n) for n in range(len(tasks))])
    record = write_shard(0, 1, blocks, repeated_ids(staging, len(tasks)), staging)
    kept = decode_rows(pq.read_table(f"{staging.out}/{record['file']['name']}")) if record["file"] else []
    quarantine = Path(staging.out) / "quarantine"
    listed = [r for file in sorted(quarantine.glob("*.parquet")) for r in pq.read_table(file).to_pylist()]
    assert Counter(r["reason"] for r in listed) == bad and all(r["message"] and r["id"] for r in listed)
    return rows, kept, bad


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("make", CLASSES, ids=lambda f: f.__name__)
def test_hostile_input_is_reported_quarantined_or_passes_whole(make, seed, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    case = make(random.Random(f"{make.__name__} {seed}"), folder)
    before = set(tmp_path.rglob("*"))
    staging = Staging(str(tmp_path / "staging"), str(tmp_path / "out"))
    if case.error:
        with pytest.raises(SourceError) as error:
            through(folder, staging)
        assert re.search(case.error, str(error.value))
        return
    rows, kept, bad = through(folder, staging)
    written = {p.relative_to(tmp_path).parts[0] for p in set(tmp_path.rglob("*")) - before}
    assert written <= {"staging", "out"}
    ids = [c.id for row in kept for c in row.conversations]
    assert rows == case.rows, "rows lost or invented while reading"
    assert len(set(ids)) == len(ids) and len(ids) + bad.total() == rows, "rows lost between reading and the shard"
    if "*" not in case.bad:
        for reasons, count in case.bad.items():
            assert sum(bad[r] for r in reasons.split("|")) == count, bad
        assert bad.total() == sum(case.bad.values()), bad
    stored = Counter(i for row in kept for i in row.images)
    assert case.images is None or all(stored[i] for i in case.images)
    said = {m.text for row in kept for c in row.conversations for m in c.messages}
    assert case.texts is None or set(case.texts) <= said
