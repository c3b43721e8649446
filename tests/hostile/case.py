"""What a maker of hostile input returns, and how it mixes bad rows with good ones."""

import io
import json
import tarfile
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


@dataclass
class Case:
    """Files written into a folder, and what must become of their rows."""

    rows: int
    bad: dict[str, int] = field(default_factory=dict)  # "a|b": either reason
    error: str = ""  # the source as a whole is refused with this message
    images: list[bytes] | None = None  # all of these are in the shards, byte for byte
    texts: list[str] | None = None  # so are these


def encoded(rng, kind="PNG", mode="RGB", size=None) -> bytes:
    size = size or (rng.randint(2, 24), rng.randint(2, 24))
    noise = np.frombuffer(rng.randbytes(size[0] * size[1] * 3), "u1").reshape(size[1], size[0], 3)
    sink = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(sink, kind)
    return sink.getvalue()


def good(rng, **more):
    return {"image": encoded(rng), "question": f"question {rng.random()}", "answer": "yes"} | more


def mixed(rng, folder, bad):
    """Bad records among good ones, as JSON-free Parquet of one schema; returns how many there are in all."""
    records = [good(rng) for _ in range(rng.randint(2, 5))] + bad
    rng.shuffle(records)
    names = sorted({name for r in records for name in r})
    pq.write_table(
        pa.Table.from_pylist([{n: r.get(n) for n in names} for r in records]), folder / "x.parquet", row_group_size=3
    )
    return len(records)


def lines(rng, folder, bad, name="x.jsonl"):
    """Bad lines (bytes, or records) among good ones as JSON lines with image files."""
    (folder / "good.png").write_bytes(encoded(rng))
    records = [{"image": "good.png", "question": "q", "answer": "a"} for _ in range(rng.randint(2, 5))] + bad
    rng.shuffle(records)
    (folder / name).write_bytes(
        b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in records) + b"\n"
    )
    return len(records)


def tar_of(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def some(rng, make, most=4):
    return [make() for _ in range(rng.randint(1, most))]
