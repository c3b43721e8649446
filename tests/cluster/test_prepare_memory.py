"""Memory of prepare does not grow with the data.

Measured: peak RSS of fresh processes that run the functions of its tasks, without Ray. It is VmHWM: ru_maxrss begins
with the memory of the process that started this one.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

# Argument 1 is the pass, 2 the source, 3 the folder to write to, 4 the size of a shard. One process runs all
# read tasks, another writes all shards.
WORK = r"""
import re, sys
from pathlib import Path
import numpy as np
from smolray.config import DataConfig
from smolray.data.formats.discover import list_read_tasks, resolve
from smolray.data.shuffle import read_blocks, repeated_ids, run_read_task, total_bytes, write_shard
from smolray.data.staging import Staging
phase, source, folder, SHARD_BYTES = *sys.argv[1:4], int(sys.argv[4])
data, staging = DataConfig(), Staging(folder + "/staging", folder + "/out")
tasks = list_read_tasks(resolve(source, data))
if phase == "read":
    for n, task in enumerate(tasks):
        run_read_task(task, n, staging, data, 0)
else:
    blocks = np.concatenate([read_blocks(staging, n) for n in range(len(tasks))])
    shards = max(1, round(total_bytes(staging, len(tasks)) / SHARD_BYTES))
    repeated = repeated_ids(staging, len(tasks))
    print(sum(write_shard(n, shards, blocks, repeated, staging)["file"]["rows"] for n in range(shards)))
print(int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024)
"""


def write_rows(path: Path, count: int) -> None:
    """`count` rows with a bitmap each, all different, 2.3 kB: 46 MB for 20,000 rows."""
    size = 24 * 32 * 3
    header = (
        b"BM"
        + np.array([size + 54, 0, 54, 40, 24, 32], "<u4").tobytes()
        + np.array([1, 24], "<u2").tobytes()
        + bytes(24)
    )
    schema = pa.schema([("image", pa.binary()), ("question", pa.string()), ("answer", pa.string())])
    rng = np.random.default_rng(count)
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for start in range(0, count, 2000):
            images = [header + rng.bytes(size) for _ in range(2000)]
            columns = [images, [f"what is number {start + n}?" for n in range(2000)], ["noise"] * 2000]
            writer.write_table(pa.Table.from_arrays([pa.array(c) for c in columns], schema=schema))


@pytest.mark.slow
def test_prepare_memory_stays_flat(tmp_path):
    peaks = {}
    for count in (20_000, 200_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        write_rows(folder / "x.parquet", count)
        for phase in ("read", "write"):
            command = [sys.executable, "-c", WORK, phase, str(folder / "x.parquet"), str(folder), str(2**24)]
            *rows, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            peaks[phase, count] = float(peak)
            assert phase == "read" or rows == [str(count)]
    print(peaks)
    for phase in ("read", "write"):
        assert peaks[phase, 200_000] <= 1.2 * peaks[phase, 20_000], peaks


@pytest.mark.slow
def test_a_task_of_a_million_short_texts_takes_less_than_400_mb(tmp_path):
    """250,000 rows fill a read task (13.8 of 16 MiB of text) and a shard of 64 MiB; a million are four of each, and
    10 million forty. Measured: 223 MB to read, 331 MB to write (506 while the shard was made in memory). What grows
    with all rows is in the driver: 24 bytes a row for ids and contents, by arithmetic 240 MB for 10 million.
    """
    rows = (f'{{"question": "What is {n} + {n % 7}?", "answer": "{n + n % 7}"}}\n' for n in range(250_000))
    (tmp_path / "x.jsonl").write_text("".join(rows))
    for phase in ("read", "write"):
        command = [sys.executable, "-c", WORK, phase, str(tmp_path / "x.jsonl"), str(tmp_path), str(2**26)]
        *_, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        print(f"{phase}: {peak} MB")
        assert float(peak) < 400, phase
    assert len(list((tmp_path / "out").glob("shard-*.parquet"))) == 1
