"""Canonical shards: Parquet files of ShardRows, and a manifest that lists the complete ones.

Layout of a shard folder: `manifest.json`, `shard-00000.parquet` …, `quarantine/*.parquet`,
`index-<fingerprint>.parquet`. Only files named in the manifest count; it is written last.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from smolray import storage
from smolray.data.sample import Conversation, ShardRow
from smolray.run.account import DataAccount

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
PICTURES = "pictures.bin"  # hashes of the images, sorted: (n,) uint64
SHARD_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("images", pa.list_(pa.binary())),
        pa.field("conversations", pa.list_(pa.string())),  # Conversation.to_json
    ]
)
# Rows of a group are read together, so a group holds one large row or up to eight small ones.
ROW_GROUP_BYTES = 32 * 1024
ROW_GROUP_ROWS = 8


class ShardError(ValueError):
    """A shard folder is absent, torn or of another version; the message names it and the remedy."""


@dataclass(frozen=True)
class ShardFile:
    """One shard: its file name, sizes and hash."""

    name: str
    rows: int
    conversations: int
    bytes: int
    blake2b: str


@dataclass(frozen=True)
class ShardManifest:
    """What a shard folder holds. It is written last, so a folder with a manifest is whole."""

    schema_version: int
    source_fingerprint: str
    rows: int
    conversations: int
    images: int
    quarantined: dict[str, int]  # reason -> rows
    files: tuple[ShardFile, ...]
    seed: int = 0
    source: str = ""  # where the data came from, for people
    inputs: int = 0  # files of the source; 0 in older shards
    account: dict[str, Any] | None = None  # DataAccount (run/account.py) of the raw rows; None in older shards

    @property
    def fingerprint(self) -> str:
        """Identity of the data: what an index, a plan or a checkpoint was made for."""
        return hashlib.blake2b("".join(f.blake2b for f in self.files).encode(), digest_size=8).hexdigest()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def prepared_account(manifest: ShardManifest) -> DataAccount:
    """What `prepare` made of the source, as far as the manifest says it."""
    if manifest.account is None:
        return DataAccount(manifest.source, manifest.conversations)
    return DataAccount.from_json(manifest.account)


def read_manifest(folder: str) -> ShardManifest:
    """The manifest of a shard folder. Raises ShardError where there is none or it is of another version."""
    uri = storage.join(folder, MANIFEST)
    try:
        record = json.loads(storage.read_bytes(uri))
    except FileNotFoundError as error:
        raise ShardError(
            f"{folder} holds no {MANIFEST}: no finished shards there; run `smolray prepare` first"
        ) from error
    except json.JSONDecodeError as error:
        raise ShardError(f"{uri} is not JSON ({error}); run `smolray prepare` again") from error

    if record.get("schema_version") != SCHEMA_VERSION:
        found = record.get("schema_version")
        raise ShardError(f"{uri} has schema version {found}, expected {SCHEMA_VERSION}; run `smolray prepare` again")
    try:
        return ShardManifest(**{**record, "files": tuple(ShardFile(**f) for f in record["files"])})
    except (KeyError, TypeError) as error:
        raise ShardError(
            f"{uri} is not a manifest of version {SCHEMA_VERSION} ({error}); run `smolray prepare` again"
        ) from None


class HashedFile:
    """A file that is written from start to end, its size and its hash."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.size, self.hash, self.closed = file, 0, hashlib.blake2b(digest_size=16), False

    def write(self, data: Any) -> int:
        """Write some bytes."""
        view = memoryview(data)
        self.file.write(view)
        self.hash.update(view)
        self.size += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        """Hand on what was written."""
        self.file.flush()


def encode_shard(rows: Iterable[ShardRow], sink: Any) -> None:
    """Write the rows as one Parquet file into `sink`, in small row groups (<= 8 rows, closed once they hold 32 KiB)."""
    # The images are compressed already; statistics would hold their bytes a second time.
    compression = {"conversations": "zstd", "key": "none", "images": "none"}
    options = {"compression": compression, "write_statistics": False, "use_dictionary": False}

    with pq.ParquetWriter(sink, SHARD_SCHEMA, **options) as writer:
        group: list[ShardRow] = []
        size = 0
        for row in rows:
            group.append(row)
            size += sum(map(len, row.images)) + 256 * len(row.conversations)
            if len(group) == ROW_GROUP_ROWS or size >= ROW_GROUP_BYTES:
                writer.write_batch(_to_batch(group))
                group, size = [], 0
        if group:
            writer.write_batch(_to_batch(group))


def write_shards(folder: str, rows: Sequence[ShardRow], rows_per_file: int = 50, source: str = "rows") -> str:
    """A shard folder of `rows` as they stand, made in this process; for few rows. Returns the folder."""
    files = []
    for number, start in enumerate(range(0, len(rows), rows_per_file)):
        part = rows[start : start + rows_per_file]
        sink, name = io.BytesIO(), f"shard-{number:05d}.parquet"
        encode_shard(part, sink)
        data = sink.getvalue()
        storage.write_bytes(storage.join(folder, name), data)
        conversations = sum(len(r.conversations) for r in part)
        files.append(
            ShardFile(name, len(part), conversations, len(data), hashlib.blake2b(data, digest_size=16).hexdigest())
        )

    total = sum(f.conversations for f in files)
    manifest = ShardManifest(
        SCHEMA_VERSION, source, len(rows), total, sum(len(r.images) for r in rows), {}, tuple(files)
    )
    storage.write_bytes(storage.join(folder, MANIFEST), manifest.to_json().encode())
    return folder


def decode_rows(table: pa.Table) -> list[ShardRow]:
    """The rows of a table that was read from a shard."""
    return [
        ShardRow(key, tuple(images), tuple(Conversation.from_json(c) for c in conversations))
        for key, images, conversations in zip(
            table["key"].to_pylist(), table["images"].to_pylist(), table["conversations"].to_pylist(), strict=True
        )
    ]


def _to_batch(rows: list[ShardRow]) -> pa.RecordBatch:
    columns = [
        pa.array([r.key for r in rows], pa.string()),
        pa.array([list(r.images) for r in rows], pa.list_(pa.binary())),
        pa.array([[c.to_json() for c in r.conversations] for r in rows], pa.list_(pa.string())),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SHARD_SCHEMA)
