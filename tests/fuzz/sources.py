"""Damaged sources of every format: a whole source, one kind of damage done to a file of it, and what is read then.

All of it follows from a seed. What no reader can see is left out: a text file cut where a row or all but its last field
ends, and a block taken out of the middle of a text file.
"""

import bz2
import csv
import gzip
import io
import json
import random
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from PIL import Image

from smolray.config import DataConfig
from smolray.data.formats.discover import list_read_tasks, read_rows, resolve
from smolray.data.formats.images import image_reader
from smolray.data.formats.layouts import parse
from smolray.data.formats.source import SourceError
from smolray.data.sample import SampleError

DATA = DataConfig()


@dataclass
class Outcome:
    """What became of the rows of a source: the ids of those kept, and how many were told as bad."""

    kept: list[str]
    told: int


def outcome(folder: Path, task_bytes: int) -> Outcome:
    """Read a source as prepare does. Raises SourceError where it is refused."""
    found = Outcome([], 0)
    for task in list_read_tasks(resolve(str(folder), DATA), task_bytes):
        images = image_reader(task, DATA)
        for raw in read_rows(task):
            try:
                if raw.reason:
                    raise SampleError(raw.reason, raw.message)
                parsed = parse(raw.record, f"{task.name}#{raw.row}", DATA, images)
                found.kept += [sample.conversation.id for sample in parsed.samples]
            except SampleError as error:
                assert error.reason and str(error) and "Traceback" not in str(error)
                found.told += 1
    if not found.kept:
        raise SourceError(f"{folder}: all rows are bad")  # as prepare says it
    return found


def picture(rng) -> bytes:
    """A small PNG of noise."""
    noise = np.frombuffer(rng.randbytes(4 * 4 * 3), "u1").reshape(4, 4, 3)
    sink = io.BytesIO()
    Image.fromarray(noise).save(sink, "PNG")
    return sink.getvalue()


def records(rng) -> list[dict]:
    return [
        {
            "id": f"r{n}",
            "image": "a.png",
            "question": f"what, {rng.random()}?",
            "answer": rng.choice(["yes", "no", "7"]),
        }
        for n in range(rng.randint(5, 40))
    ]


def jsonl(rng, rows) -> tuple[str, bytes]:
    return "x.jsonl", b"".join(json.dumps(r).encode() + b"\n" for r in rows)


def json_list(rng, rows) -> tuple[str, bytes]:
    return "x.json", json.dumps(rows, indent=rng.choice([None, 2])).encode()


def csv_file(rng, rows) -> tuple[str, bytes]:
    sink = io.StringIO()
    writer = csv.DictWriter(sink, rows[0], quoting=csv.QUOTE_ALL, lineterminator=rng.choice(["\n", "\r\n"]))
    writer.writeheader()
    writer.writerows(rows)
    return "x.csv", sink.getvalue().encode()


def parquet(rng, rows) -> tuple[str, bytes]:
    sink = io.BytesIO()
    codec = rng.choice(["none", "snappy", "zstd"])
    table = pa.Table.from_pylist([{**r, "image": picture(rng)} for r in rows])
    pq.write_table(table, sink, compression=codec, row_group_size=rng.randint(2, 20))
    return "x.parquet", sink.getvalue()


def arrow(rng, rows) -> tuple[str, bytes]:
    sink = io.BytesIO()
    table = pa.Table.from_pylist([{**r, "image": picture(rng)} for r in rows])
    with rng.choice([pa.ipc.new_stream, pa.ipc.new_file])(sink, table.schema) as writer:
        writer.write_table(table, rng.randint(2, 20))
    return "x.arrow", sink.getvalue()


def coco(rng, rows) -> tuple[str, bytes]:
    captions = [{"id": n, "image_id": 1, "caption": r["question"]} for n, r in enumerate(rows)]
    record = {"info": {}, "images": [{"id": 1, "file_name": "a.png"}], "annotations": captions}
    return "x.json", json.dumps(record, indent=rng.choice([None, 1])).encode()


def tar(rng, rows) -> tuple[str, bytes]:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=rng.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])) as archive:
        for row in rows:
            folder = rng.choice(["", "long/" * 30])  # long names have headers of their own
            text = json.dumps({k: v for k, v in row.items() if k != "image"}).encode()
            for ending, content in (("json", text), ("png", picture(rng))):
                info = tarfile.TarInfo(f"{folder}{row['id']}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return "x.tar", sink.getvalue()


def compressed(make, ending, compress):
    def made(rng, rows):
        name, content = make(rng, rows)
        return name + ending, compress(content)

    made.__name__ = make.__name__ + ending.replace(".", "_")
    return made


def zstd(content: bytes) -> bytes:
    """One frame with a checksum, as the command `zstd` writes it; pyarrow leaves the checksum out."""
    frame = bytearray(pa.compress(content, codec="zstd", asbytes=True))
    frame[4] |= 4  # the flag of the checksum in the frame's descriptor
    return bytes(frame) + xxhash.xxh64(content).digest()[::-1][:4]


TEXTS = (jsonl, csv_file)
FORMATS = (
    *TEXTS,
    json_list,
    coco,
    parquet,
    arrow,
    tar,
    compressed(jsonl, ".gz", gzip.compress),
    compressed(csv_file, ".gz", gzip.compress),
    compressed(json_list, ".bz2", bz2.compress),
    compressed(tar, ".gz", gzip.compress),
    compressed(jsonl, ".zst", zstd),
    compressed(tar, ".zst", zstd),
)


def flip(rng, data: bytearray, text: bool) -> bytes:
    """One bit is another; in a container up to three."""
    for _ in range(1 if text else rng.randint(1, 3)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def cut(rng, data: bytearray, text: bool) -> bytes:
    """The file ends too early; a text in the middle of a row."""
    if not text:
        return bytes(data[: rng.randrange(len(data))])
    starts = [0, *(n + 1 for n, byte in enumerate(data) if byte == ord("\n"))]
    row = rng.randrange(1, len(starts) - 1)
    places = range(starts[row] + 1, starts[row + 1] - 3)
    return bytes(data[: rng.choice([n for n in places if data[n - 1] != ord(",")])])


def hole(rng, data: bytearray, text: bool) -> bytes:
    """A block of zeros."""
    start, size = rng.randrange(len(data) - 100), rng.randint(64, 500)
    data[start : start + size] = bytes(len(data[start : start + size]))
    return bytes(data)


def garbage(rng, data: bytearray, text: bool) -> bytes:
    """A block of random bytes."""
    start, size = rng.randrange(len(data) - 100), rng.randint(64, 500)
    data[start : start + size] = rng.randbytes(len(data[start : start + size]))
    return bytes(data)


def trailing(rng, data: bytearray, text: bool) -> bytes:
    """Random bytes behind the end."""
    return bytes(data) + rng.randbytes(rng.randint(1, 600))


def missing_block(rng, data: bytearray, text: bool) -> bytes:
    """A block is taken out of the middle of a container; a text is emptied."""
    if text or data[:1] in (b"[", b"{"):
        return b""
    start = rng.randrange(len(data) - 100)
    del data[start : start + rng.randint(1, 1500)]
    return bytes(data)


DAMAGES = (flip, cut, hole, garbage, trailing, missing_block)


def damaged_source(seed: int, folder: Path) -> tuple[str, int, int]:
    """Write the damaged source of a seed. Returns what was done, the rows of the whole source, and a task size."""
    rng = random.Random(seed)
    rows = records(rng)
    make, damage = rng.choice(FORMATS), rng.choice(DAMAGES)
    name, content = make(rng, rows)
    (folder / "a.png").write_bytes(picture(rng))
    (folder / name).write_bytes(damage(rng, bytearray(content), make in TEXTS))
    return f"seed {seed}: {make.__name__}, {damage.__name__}", len(rows), rng.choice([3000, 30_000, 2**28])
