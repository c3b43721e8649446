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
from smolray.data.sample import Conversation, SampleError, ShardRow
from smolray.data.shards import HashedFile, ShardFile, encode_shard
from smolray.data.split import PICTURE_DTYPE, WHOLE, Part, hold_out
from smolray.data.staging import BLOCK_DTYPE, KEY_SPACE, ROW_SCHEMA, SKETCH_KEYS, Runs, Sketch, Staging, hash64
from smolray.data.tally import RowTally
from smolray.run.account import RowAccount

MAX_CONVERSATIONS = 64  # of one shard row


@dataclass(frozen=True)
class ReadTaskResult:
    """What became of the rows of a read task. `examples` are (id, reason, message) of the first bad ones."""

    rows: RowAccount
    examples: tuple[tuple[str, str, str], ...]
    conversations: int
    source: int = 0


def run_read_task(
    task: ReadTask, number: int, staging: Staging, data: DataConfig, seed: int, limit: int | None = None
) -> ReadTaskResult:
    """Read, parse and check the rows of a task, up to `limit` conversations, and write them as sorted runs.

    Doing it again gives the same files.

    Raises SourceError where the source as a whole cannot be read.
    """
    images = image_reader(task, data)
    runs = Runs(number, staging, seed, splits=data.validation_fraction > 0)
    quarantine, tally = Quarantine(task), RowTally(data)

    for raw in read_rows(task) if limit != 0 else ():
        if limit is not None and runs.ids.count >= limit:
            break
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
        for k, sample in enumerate(parsed.samples[: None if limit is None else limit - runs.ids.count]):
            if task.source:
                sample = replace(sample, conversation=replace(sample.conversation, source=task.source))
            runs.add(sample, f"{task.file:06d}.{raw.row:012d}.{k:06d}", place)

    runs.finish()
    if quarantine:
        storage.write_bytes(staging.quarantine(number), quarantine.to_parquet())
    result = ReadTaskResult(tally.account(), tuple(quarantine.examples), runs.ids.count, task.source)
    storage.write_bytes(staging.task(number, "json"), json.dumps(asdict(result)).encode())
    return result


def read_result(staging: Staging, number: int) -> ReadTaskResult:
    """The marker of a read task, which is there once its work is whole."""
    record = json.loads(storage.read_bytes(staging.task(number, "json")))
    examples = tuple((i, r, m) for i, r, m in record["examples"])
    return ReadTaskResult(**record | {"rows": RowAccount(**record["rows"]), "examples": examples})


def read_blocks(staging: Staging, number: int) -> np.ndarray:
    """Index of the blocks of a task's runs: (blocks,) of BLOCK_DTYPE."""
    return np.frombuffer(storage.read_bytes(staging.task(number, "blocks")), BLOCK_DTYPE)


def total_bytes(staging: Staging, tasks: int) -> int:
    """Bytes of all distinct rows.

    Exact for few of them, else estimated from the SKETCH_KEYS smallest order keys (bottom-k sketch).

    Repeats of an image in other tasks are not counted again, and the figure does not depend on how tasks were cut.
    """
    merged = Sketch()
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


def pictures(staging: Staging, tasks: int) -> np.ndarray:
    """The hashes of all distinct images, sorted: (n,) uint64."""
    each = (np.frombuffer(storage.read_bytes(staging.task(n, "pictures")), "u8") for n in range(tasks))
    return np.unique(np.concatenate([np.empty(0, "u8"), *each]))


def split_parts(staging: Staging, tasks: int, fraction: float) -> tuple[Part, Part]:
    """What is held out for validation, and the rest (data/split.py)."""
    each = (np.frombuffer(storage.read_bytes(staging.task(n, "records")), PICTURE_DTYPE) for n in range(tasks))
    return hold_out(np.concatenate([np.empty(0, PICTURE_DTYPE), *each]), fraction)


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


def write_shard(
    number: int,
    shards: int,
    blocks: np.ndarray,
    repeated: np.ndarray,
    staging: Staging,
    part: Part = WHOLE,
) -> dict[str, Any]:
    """Gather the rows of slice `number` of `shards` from all runs and write those of a part as one shard.

    Returns {"file": a ShardFile as a dict, or None for an empty slice, "images": n}. A shard already there is trusted
    only with its hash.
    """
    name = f"shard-{number:05d}.parquet"
    if (done := _finished_shard(staging, number, storage.join(staging.out, name))) is not None:
        return done

    low, high = number * KEY_SPACE // shards, (number + 1) * KEY_SPACE // shards
    staged = (row for row in _read_slice(blocks, low, high, staging) if part.holds(row["order"]))
    rows = _gather(staged, repeated)
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
    value = np.uint64(hash64(conversation.id.encode()))
    at = np.searchsorted(repeated, value)
    return (
        replace(conversation, id=f"{conversation.id}@{place}")
        if at < len(repeated) and repeated[at] == value
        else conversation
    )
