"""Staged rows: a read task on its way to sorted runs, and the small tables that say what is in them.

In: samples. Out: runs (rows sorted by order key, in indexed blocks), and for each read task the hashes of its ids,
contents and images, and a sketch of its sizes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa

from smolray import storage
from smolray.data.sample import Sample, image_digests, key_of
from smolray.data.split import PICTURE_DTYPE

RUN_BYTES = 32 * 2**20  # payload held in memory before a run is written
BLOCK_BYTES = 64 * 2**10  # a shard reads whole blocks of each run, so they are small
SKETCH_KEYS = 1024
KEY_SPACE = 2**64
ROW_SCHEMA = pa.schema(
    [
        pa.field("order", pa.uint64()),  # where the row stands in the whole
        pa.field("key", pa.string()),
        # file and row as fixed-width numbers: the order of conversations about one image
        pa.field("origin", pa.string()),
        pa.field("place", pa.string()),  # the same in words, for ids
        pa.field("conversation", pa.string()),
        pa.field("images", pa.list_(pa.binary())),  # null but for the first row of a key
    ]
)
BLOCK_DTYPE = np.dtype(
    [("task", "u4"), ("run", "u4"), ("offset", "u8"), ("length", "u8"), ("first", "u8"), ("last", "u8")]
)


@dataclass(frozen=True)
class Staging:
    """Where the files of one prepare are: `folder` for what is deleted at the end, `out` for what stays.

    `part`: of the shards, where the rows go to several folders.
    """

    folder: str
    out: str
    part: str = "shards"

    def task(self, number: int, suffix: str) -> str:
        return storage.join(self.folder, "tasks", f"task-{number:05d}.{suffix}")

    def run(self, task: int, run: int) -> str:
        return storage.join(self.folder, "runs", f"task-{task:05d}-{run:03d}.bin")

    def shard_marker(self, number: int) -> str:
        return storage.join(self.folder, self.part, f"shard-{number:05d}.json")

    def quarantine(self, task: int) -> str:
        return storage.join(self.out, "quarantine", f"task-{task:05d}.parquet")


def hash64(data: bytes, seed: int = 0) -> int:
    """A hash of 64 bits."""
    return int.from_bytes(blake2b(data, digest_size=8, key=seed.to_bytes(8, "big")).digest(), "big")


def image_hash(digest: bytes) -> int:
    """What identifies an image among those of all data sets, from its digest."""
    return int.from_bytes(digest[:8], "big")


class _Hashes:
    """Hashes of texts, 8 bytes each, in an array that grows."""

    def __init__(self) -> None:
        self.values, self.count = np.empty(1024, "u8"), 0

    def add(self, text: str) -> None:
        if self.count == len(self.values):
            self.values = np.concatenate([self.values, np.empty_like(self.values)])
        self.values[self.count] = hash64(text.encode())
        self.count += 1

    def to_array(self) -> np.ndarray:
        return self.values[: self.count]


class Runs:
    """Rows of one read task on their way to staging: sorted, each image kept once, written every RUN_BYTES."""

    def __init__(self, task: int, staging: Staging, seed: int, splits: bool = False):
        self.task, self.staging, self.seed = task, staging, seed
        self.rows: list[tuple[int, str, str, str, str]] = []  # order, key, origin, place, conversation
        self.images: dict[str, tuple[bytes, ...]] = {}
        self.held = self.run = 0
        self.ids, self.contents = _Hashes(), _Hashes()
        self.pictures: set[int] = set()
        self.records: list[tuple[int, int, int]] | None = [] if splits else None  # of PICTURE_DTYPE
        self.blocks: list[np.ndarray] = []
        self.sketch = Sketch()

    def add(self, sample: Sample, origin: str, place: str) -> None:
        """Add a sample: where it stands among all rows (`origin`), and the same in words (`place`)."""
        digests, text = image_digests(sample.images), sample.conversation.to_json()
        key = key_of(digests, sample.conversation)
        order, size = hash64(key.encode(), self.seed), sum(map(len, sample.images))
        content = sample.conversation.content
        self.ids.add(sample.conversation.id)
        self.contents.add((key if sample.images else "") + content)
        self.pictures.update(image_hash(digest) for digest in digests)
        if self.records is not None:
            for number, one in enumerate(digests or [content.encode()]):
                self.records.append((order, hash64(one, self.seed), number == 0))
        self.sketch.add(order, size, len(text))
        if key not in self.images:
            self.images[key] = sample.images
            self.held += size
        self.rows.append((order, key, origin, place, text))
        self.held += 2 * len(text) + 300  # what the tuple and its strings take
        if self.held >= RUN_BYTES:
            self._write()

    def finish(self) -> None:
        """Write what is left, and the tables of the task."""
        if self.rows:
            self._write()
        tables = {
            "ids": self.ids.to_array(),
            "contents": self.contents.to_array(),
            "pictures": np.array(sorted(self.pictures), "u8"),
            "blocks": np.concatenate([np.empty(0, BLOCK_DTYPE), *self.blocks]),
            "sketch": self.sketch.to_array(),
        }
        if self.records is not None:
            tables["records"] = np.array(self.records, PICTURE_DTYPE)
        for suffix, table in tables.items():
            storage.write_bytes(self.staging.task(self.task, suffix), table.tobytes())

    def _write(self) -> None:
        sink, index = pa.BufferOutputStream(), []
        for block in self._blocks():
            start = sink.tell()
            sink.write(pa.RecordBatch.from_pylist(block, ROW_SCHEMA).serialize())
            index.append((self.task, self.run, start, sink.tell() - start, block[0]["order"], block[-1]["order"]))
        content = memoryview(sink.getvalue())
        storage.write_bytes(self.staging.run(self.task, self.run), content)  # type: ignore[arg-type]
        self.blocks.append(np.array(index, BLOCK_DTYPE))
        self.rows, self.images, self.held, self.run = [], {}, 0, self.run + 1

    def _blocks(self) -> Iterator[list[dict[str, Any]]]:
        block: list[dict[str, Any]] = []
        size = 0
        for order, key, origin, place, text in sorted(self.rows):
            images = self.images.pop(key, None)  # with the first row of a key only
            block.append(
                {"order": order, "key": key, "origin": origin, "place": place, "conversation": text, "images": images}
            )
            size += sum(map(len, images or ())) + len(text)
            if size >= BLOCK_BYTES:
                yield block
                block, size = [], 0
        if block:
            yield block


class Sketch:
    """Bytes of the rows with the SKETCH_KEYS smallest order keys; sketches of parts merge to that of the whole."""

    def __init__(self) -> None:
        self.sizes: dict[int, tuple[int, int]] = {}
        self.limit = KEY_SPACE

    def add(self, order: int, image_bytes: int, text_bytes: int) -> None:
        if order >= self.limit:
            return
        known = self.sizes.get(order, (0, 0))
        self.sizes[order] = (image_bytes, known[1] + text_bytes)
        if len(self.sizes) >= 2 * SKETCH_KEYS:
            kept = sorted(self.sizes)[:SKETCH_KEYS]
            self.sizes = {k: self.sizes[k] for k in kept}
            self.limit = kept[-1] + 1

    def to_array(self) -> np.ndarray:
        """(keys, 3) uint64: order key, image bytes, text bytes; sorted by key."""
        kept = sorted(self.sizes)[:SKETCH_KEYS]
        return np.array([(k, *self.sizes[k]) for k in kept], "u8").reshape(-1, 3)
