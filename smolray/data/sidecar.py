"""Sidecars: tables next to the shards with the same rows and row groups.

A reader reads no more of them than of a shard.

In: for each shard a table for each of its row groups. Out: `<shards>/<kind>-<identity>/` with a Parquet file of the
same name for each shard, a note of each once it is whole, and, last, `manifest.json`. After an interruption a file
that has its note is not made again.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from smolray import storage
from smolray.data.shards import MANIFEST, ShardError, ShardManifest

VERSION = 1
STALE_SECONDS = 3600


@dataclass(frozen=True)
class Sidecar:
    """A sidecar's name: `identity` is a hash of all that its values depend on, `about` the same for people."""

    folder: str  # of the shards
    kind: str
    identity: str
    about: dict[str, Any]

    @property
    def uri(self) -> str:
        return storage.join(self.folder, f"{self.kind}-{self.identity}")


@dataclass(frozen=True)
class TableFile:
    """One file of a sidecar: its name, sizes and hash."""

    name: str
    rows: int
    bytes: int
    blake2b: str


def identity_of(*parts: Any) -> str:
    """A hash of JSON values. It is a part of the folder's name, so a sidecar of other inputs is never read."""
    return hashlib.blake2b(
        json.dumps([VERSION, *parts], sort_keys=True, default=str).encode(), digest_size=8
    ).hexdigest()


def unfinished(sidecar: Sidecar, shards: ShardManifest) -> list[int]:
    """Numbers of the shards whose table is not there or not whole. Raises ShardError where the manifest is damaged."""
    sizes = {info.base_name: info.size for info in storage.list_files(sidecar.uri)}
    files = (
        _read_manifest(sidecar, shards)
        if MANIFEST in sizes
        else {f.name: _read_note(sidecar.uri, f.name, sizes) for f in shards.files}
    )
    return [n for n, f in enumerate(shards.files) if (made := files[f.name]) is None or sizes.get(f.name) != made.bytes]


def is_whole(sidecar: Sidecar, shards: ShardManifest) -> bool:
    """Whether the sidecar is there, manifest and all. Raises ShardError where the manifest is damaged."""
    return storage.exists(storage.join(sidecar.uri, MANIFEST)) and not unfinished(sidecar, shards)


def complete(sidecar: Sidecar, shards: ShardManifest, make: Callable[[list[int]], None]) -> str:
    """The URI of the sidecar, once `make` has written the tables (write_table) of those shards that have none.

    Raises ShardError.
    """
    manifest = storage.join(sidecar.uri, MANIFEST)
    if is_whole(sidecar, shards):
        return sidecar.uri
    todo = unfinished(sidecar, shards)
    storage.delete(manifest)  # of a folder that has lost a file
    if todo:
        make(todo)
    sizes = {info.base_name: info.size for info in storage.list_files(sidecar.uri)}
    notes = {f.name: _read_note(sidecar.uri, f.name, sizes) for f in shards.files}
    if lost := [name for name, note in notes.items() if note is None]:
        raise ShardError(
            f"{sidecar.uri} lacks {len(lost)} of {len(shards.files)} tables after all were made: "
            f"{', '.join(lost[:3])} …; start again"
        )
    record = {
        "schema_version": VERSION,
        "kind": sidecar.kind,
        "identity": sidecar.identity,
        "about": sidecar.about,
        "files": [asdict(note) for note in notes.values() if note],
    }
    storage.write_bytes(manifest, json.dumps(record, indent=1).encode())
    # left by killed writers; a writer at work touches its file every few seconds
    for info in storage.list_files(sidecar.uri):
        if info.extension == "tmp" and time.time() - info.mtime.timestamp() > STALE_SECONDS:
            storage.delete(storage.join(sidecar.uri, info.base_name))
    return sidecar.uri


def write_table(sidecar: Sidecar, name: str, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Write one shard's table, each of `tables` as a row group, as they come; then its note."""
    rows = 0
    # A table may be too large to be spooled to the local disk first; it counts only with its note.
    with storage.writing(storage.join(sidecar.uri, name), spool=False) as file:
        sink = _HashingSink(file)
        # Neither dictionaries nor statistics: the values are bits that no one searches.
        with pq.ParquetWriter(
            pa.PythonFile(sink, mode="w"),
            schema,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        ) as writer:
            for table in tables:
                writer.write_table(table, row_group_size=max(1, len(table)))
                rows += len(table)

        note = TableFile(name, rows, sink.size, sink.digest.hexdigest())

    storage.write_bytes(storage.join(sidecar.uri, _note(name)), json.dumps(asdict(note)).encode())


def open_table(uri: str, name: str) -> pq.ParquetFile:
    """A shard's table, to be read row group by row group; a page whose checksum is wrong raises OSError."""
    fs, path = storage.filesystem(storage.join(uri, name))
    return pq.ParquetFile(path, filesystem=fs, page_checksum_verification=True)


class _HashingSink:
    """A file that counts and hashes what goes through it."""

    closed = False

    def __init__(self, file: Any):
        self.file, self.size, self.digest = file, 0, hashlib.blake2b(digest_size=16)

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.size += len(data)
        self.file.write(data)
        return len(data)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:  # who opened the file closes it
        self.flush()


def _note(name: str) -> str:
    return f"{name}.json"


def _read_note(uri: str, name: str, sizes: dict[str, int]) -> TableFile | None:
    """The note of a file that is whole; None where the file has to be made."""
    if _note(name) not in sizes or name not in sizes:
        return None
    try:
        note = TableFile(**json.loads(storage.read_bytes(storage.join(uri, _note(name)))))
    except (json.JSONDecodeError, TypeError):
        return None
    return note if sizes[name] == note.bytes else None


def _read_manifest(sidecar: Sidecar, shards: ShardManifest) -> dict[str, TableFile]:
    uri = storage.join(sidecar.uri, MANIFEST)
    remedy = f"delete {sidecar.uri} to have it made again"
    try:
        record = json.loads(storage.read_bytes(uri))
        found = (record["schema_version"], record["kind"], record["identity"])
        files = {f["name"]: TableFile(**f) for f in record["files"]}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ShardError(f"{uri} is damaged ({type(error).__name__}: {error}); {remedy}") from None
    if found != (expected := (VERSION, sidecar.kind, sidecar.identity)):
        raise ShardError(
            f"{uri} says version, kind and identity {found}, expected {expected}: it was made of other weights, "
            f"processor or shards; {remedy}"
        )
    if {name: f.rows for name, f in files.items()} != {f.name: f.rows for f in shards.files}:
        raise ShardError(f"{uri} is of other files or rows than the shards' own manifest; {remedy}")
    return files
