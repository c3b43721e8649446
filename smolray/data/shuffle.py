"""The shuffle behind prepare, without Ray: a read task -> sorted runs in staging, a slice of the order -> a shard.

In: a ReadTask, later a slice of the order-key space. Out: runs in staging (rows sorted by order key, in indexed
blocks), a quarantine file, `shard-00000.parquet`, and for each a marker that is written last: work counts once it is
whole, and is done once.

The order key of a row is a hash of (seed, its images). Sorting by it shuffles all rows, gathers those about the same
images, and gives the same result however the work was cut. Shards are equal slices of the key space, so no histogram of
it is needed.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from heapq import merge
from itertools import chain, groupby, islice
from typing import Any

import numpy as np
import pyarrow as pa

from smolray import storage
from smolray.config import DataConfig
from smolray.data.formats.columns import id_if_any
from smolray.data.formats.discover import read_rows
from smolray.data.formats.images import image_reader
from smolray.data.formats.layouts import parse
from smolray.data.formats.source import ReadTask
from smolray.data.quarantine import Quarantine
from smolray.data.sample import Conversation, Sample, SampleError, ShardRow, image_key
from smolray.data.shards import HashedFile, ShardFile, encode_shard
from smolray.data.tally import RowTally
from smolray.run.account import RowAccount

RUN_BYTES = 32 * 2**20  # payload held in memory before a run is written
BLOCK_BYTES = 64 * 2**10  # a shard reads whole blocks of each run, so they are small
SKETCH_KEYS = 1024
MAX_CONVERSATIONS = 64  # of one shard row
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
class ReadTaskResult:
    """What became of the rows of a read task. `examples` are (id, reason, message) of the first bad ones."""

    rows: RowAccount
    examples: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Staging:
    """Where the files of one prepare are: `folder` for what is deleted at the end, `out` for what stays."""

    folder: str
    out: str

    def task(self, number: int, suffix: str) -> str:
        return storage.join(self.folder, "tasks", f"task-{number:05d}.{suffix}")

    def run(self, task: int, run: int) -> str:
        return storage.join(self.folder, "runs", f"task-{task:05d}-{run:03d}.bin")

    def shard_marker(self, number: int) -> str:
        return storage.join(self.folder, "shards", f"shard-{number:05d}.json")

    def quarantine(self, task: int) -> str:
        return storage.join(self.out, "quarantine", f"task-{task:05d}.parquet")


def run_read_task(task: ReadTask, number: int, staging: Staging, data: DataConfig, seed: int) -> ReadTaskResult:
    """Read, parse and check the rows of a task and write them as sorted runs. Doing it again gives the same files.

    Raises SourceError where the source as a whole cannot be read.
    """
    images = image_reader(task, data)
    runs, quarantine, tally = _Runs(number, staging), Quarantine(task), RowTally(data)

    for raw in read_rows(task):
        place = f"{task.name}#{raw.row}"
        row_id = f"{task.name}#{raw.name}" if raw.name else place
        try:
            if raw.reason:
                raise SampleError(raw.reason, raw.message)
            parsed = parse(raw.record, row_id, data, images)
        except SampleError as error:
            quarantine.add(row_id, id_if_any(raw.record, data), error, raw.row)
            tally.quarantine(error.reason)
            continue
        tally.keep(raw.record, parsed)
        for k, sample in enumerate(parsed.samples):
            runs.add(sample, f"{task.file:06d}.{raw.row:012d}.{k:06d}", place, seed)

    blocks, sketch = runs.finish()
    if quarantine:
        storage.write_bytes(staging.quarantine(number), quarantine.to_parquet())
    storage.write_bytes(staging.task(number, "ids"), runs.ids.to_bytes())
    storage.write_bytes(staging.task(number, "contents"), runs.contents.to_bytes())
    storage.write_bytes(staging.task(number, "blocks"), blocks.tobytes())
    storage.write_bytes(staging.task(number, "sketch"), sketch.tobytes())
    result = ReadTaskResult(tally.account(), tuple(quarantine.examples))
    storage.write_bytes(staging.task(number, "json"), json.dumps(asdict(result)).encode())
    return result


def read_result(staging: Staging, number: int) -> ReadTaskResult:
    """The marker of a read task, which is there once its work is whole."""
    record = json.loads(storage.read_bytes(staging.task(number, "json")))
    return ReadTaskResult(RowAccount(**record["rows"]), tuple((i, r, m) for i, r, m in record["examples"]))


def read_blocks(staging: Staging, number: int) -> np.ndarray:
    """Index of the blocks of a task's runs: (blocks,) of BLOCK_DTYPE."""
    return np.frombuffer(storage.read_bytes(staging.task(number, "blocks")), BLOCK_DTYPE)


def total_bytes(staging: Staging, tasks: int) -> int:
    """Bytes of all distinct rows.

    Exact for few of them, else estimated from the SKETCH_KEYS smallest order keys (bottom-k sketch).

    Repeats of an image in other tasks are not counted again, and the figure does not depend on how tasks were cut.
    """
    merged = _Sketch()
    for number in range(tasks):
        sketch = np.frombuffer(storage.read_bytes(staging.task(number, "sketch")), "u8").reshape(-1, 3)
        for order, image_bytes, text_bytes in sketch.tolist():
            merged.add(order, image_bytes, text_bytes)

    array = merged.to_array()
    if len(array) < SKETCH_KEYS:
        return int(array[:, 1:].sum())
    return int(array[:-1, 1:].sum()) * KEY_SPACE // int(array[-1, 0])


def repeated_ids(staging: Staging, tasks: int, rows_at_once: int = 2**24) -> np.ndarray:
    """Hashes of the ids that more than one conversation has, sorted: (n,) uint64.

    Holds `rows_at_once` hashes at a time.
    """
    parts = _counted_hashes(staging, tasks, "ids", rows_at_once)
    return np.sort(np.concatenate([values[counts > 1] for values, counts in parts]))


def duplicates(staging: Staging, tasks: int, rows_at_once: int = 2**24) -> int:
    """Conversations that say the same about the same images as an earlier one, whatever their ids."""
    return sum(int((counts - 1).sum()) for _, counts in _counted_hashes(staging, tasks, "contents", rows_at_once))


def _counted_hashes(
    staging: Staging, tasks: int, suffix: str, rows_at_once: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The distinct hashes of all tasks and how often each is there, in as many parts as `rows_at_once` needs."""
    count = sum(storage.file_size(staging.task(n, suffix)) // 8 for n in range(tasks))
    passes = 1 + count // rows_at_once
    for part in range(passes):
        hashes = []
        for n in range(tasks):
            whole = np.frombuffer(storage.read_bytes(staging.task(n, suffix)), "u8")
            hashes.append(whole if passes == 1 else whole[whole % np.uint64(passes) == part])
        yield np.unique(np.concatenate([np.empty(0, "u8"), *hashes]), return_counts=True)


def write_shard(number: int, shards: int, blocks: np.ndarray, repeated: np.ndarray, staging: Staging) -> dict[str, Any]:
    """Gather the rows of slice `number` of `shards` from all runs and write them as one shard.

    Returns {"file": a ShardFile as a dict, or None for an empty slice, "images": n}. A shard already there is trusted
    only with its hash.
    """
    name = f"shard-{number:05d}.parquet"
    if (done := _finished_shard(staging, number, storage.join(staging.out, name))) is not None:
        return done

    low, high = number * KEY_SPACE // shards, (number + 1) * KEY_SPACE // shards
    rows = _gather(_read_slice(blocks, low, high, staging), repeated)
    counted, file = _Counted(rows), None
    if (first := next(rows, None)) is not None:
        counted.source = chain([first], rows)
        with storage.writing(storage.join(staging.out, name)) as opened:  # in memory it would take twice its size
            sink = HashedFile(opened)
            encode_shard(counted, sink)
        digest = sink.hash.hexdigest()
        file = asdict(ShardFile(name, counted.rows, counted.conversations, sink.size, digest))
    record = {"file": file, "images": counted.images}
    storage.write_bytes(staging.shard_marker(number), json.dumps(record).encode())
    return record


def _finished_shard(staging: Staging, number: int, uri: str) -> dict[str, Any] | None:
    try:
        record = json.loads(storage.read_bytes(staging.shard_marker(number)))
        file = record["file"]
        if file is None or blake2b(storage.read_bytes(uri), digest_size=16).hexdigest() == file["blake2b"]:
            return record
    except FileNotFoundError:
        pass  # no marker or no shard: the work is still to be done
    return None


@dataclass
class _Counted:
    """Shard rows on their way to a file, one at a time: in memory they take many times their text."""

    source: Iterable[ShardRow]
    rows: int = 0
    conversations: int = 0
    images: int = 0

    def __iter__(self) -> Iterator[ShardRow]:
        before: tuple[bytes, ...] = ()
        for row in self.source:
            self.images += 0 if self.rows and before == row.images else len(row.images)
            self.rows, self.conversations, before = (
                self.rows + 1,
                self.conversations + len(row.conversations),
                row.images,
            )
            yield row


def _read_slice(blocks: np.ndarray, low: int, high: int, staging: Staging) -> Iterator[dict[str, Any]]:
    """All staged rows with low <= order < high, sorted: the sorted runs are merged."""
    wanted = blocks[(blocks["last"] >= np.uint64(low)) & (blocks["first"] <= np.uint64(high - 1))]
    runs = [
        _read_run(staging.run(task, run), [(int(b["offset"]), int(b["length"])) for b in group], low, high)
        for (task, run), group in groupby(wanted, key=lambda b: (int(b["task"]), int(b["run"])))
    ]
    return merge(*runs, key=lambda row: (row["order"], row["key"], row["origin"]))


def _read_run(uri: str, spans: Sequence[tuple[int, int]], low: int, high: int) -> Iterator[dict[str, Any]]:
    """The rows of a slice in one run: one range read, and one block of rows in memory at a time."""
    fs, path = storage.filesystem(uri)
    start = spans[0][0]
    with fs.open_input_file(path) as file:
        content = pa.py_buffer(file.read_at(spans[-1][0] + spans[-1][1] - start, start))

    for offset, length in spans:
        batch = pa.ipc.read_record_batch(content.slice(offset - start, length), ROW_SCHEMA)
        orders = batch["order"].to_numpy()
        begin = np.searchsorted(orders, np.uint64(low))
        end = np.searchsorted(orders, np.uint64(high - 1), side="right")
        yield from batch.slice(begin, end - begin).to_pylist()


def _gather(staged: Iterable[dict[str, Any]], repeated: np.ndarray) -> Iterator[ShardRow]:
    """Shard rows in order: conversations about the same images together, text-only ones single.

    At most MAX_CONVERSATIONS a row. `staged` is sorted, so the first row of a key has its images.
    """
    for key, members in groupby(staged, key=lambda r: r["key"]):
        yield from _rows_of(key, members, repeated)


def _rows_of(key: str, members: Iterator[dict[str, Any]], repeated: np.ndarray) -> Iterator[ShardRow]:
    first = next(members)
    images = tuple(first["images"] or ())
    rest = chain([first], members)
    while part := list(islice(rest, MAX_CONVERSATIONS if images else 1)):
        found = (_unique(Conversation.from_json(r["conversation"]), r["place"], repeated) for r in part)
        yield ShardRow(key, images, tuple(found))


def _unique(conversation: Conversation, place: str, repeated: np.ndarray) -> Conversation:
    """Ids that several rows of the source have get the place of the row appended: `id@file#row`."""
    value = np.uint64(_hash(conversation.id.encode()))
    at = np.searchsorted(repeated, value)
    return (
        replace(conversation, id=f"{conversation.id}@{place}")
        if at < len(repeated) and repeated[at] == value
        else conversation
    )


def _hash(data: bytes, seed: int = 0) -> int:
    return int.from_bytes(blake2b(data, digest_size=8, key=seed.to_bytes(8, "big")).digest(), "big")


class _Hashes:
    """Hashes of texts, 8 bytes each, in an array that grows."""

    def __init__(self) -> None:
        self.values, self.count = np.empty(1024, "u8"), 0

    def add(self, text: str) -> None:
        if self.count == len(self.values):
            self.values = np.concatenate([self.values, np.empty_like(self.values)])
        self.values[self.count] = _hash(text.encode())
        self.count += 1

    def to_bytes(self) -> bytes:
        return self.values[: self.count].tobytes()


class _Runs:
    """Rows of one read task on their way to staging: sorted, each image kept once, written every RUN_BYTES."""

    def __init__(self, task: int, staging: Staging):
        self.task, self.staging = task, staging
        self.rows: list[tuple[int, str, str, str, str]] = []  # order, key, origin, place, conversation
        self.images: dict[str, tuple[bytes, ...]] = {}
        self.held = self.run = 0
        self.ids, self.contents = _Hashes(), _Hashes()
        self.blocks: list[np.ndarray] = []
        self.sketch = _Sketch()

    def add(self, sample: Sample, origin: str, place: str, seed: int) -> None:
        text, key = sample.conversation.to_json(), image_key(sample.images, sample.conversation)
        order, size = _hash(key.encode(), seed), sum(map(len, sample.images))
        self.ids.add(sample.conversation.id)
        self.contents.add((key if sample.images else "") + sample.conversation.content)
        self.sketch.add(order, size, len(text))
        if key not in self.images:
            self.images[key] = sample.images
            self.held += size
        self.rows.append((order, key, origin, place, text))
        self.held += 2 * len(text) + 300  # what the tuple and its strings take
        if self.held >= RUN_BYTES:
            self._write()

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        if self.rows:
            self._write()
        return np.concatenate([np.empty(0, BLOCK_DTYPE), *self.blocks]), self.sketch.to_array()

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


class _Sketch:
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
