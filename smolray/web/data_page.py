"""The page Data: the prepared data of the storage, what became of its rows, and how long its conversations are.

In: the shard folders of the storage. Out: the list; of one its account, its quarantine with reasons, its lengths.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from fastapi.responses import Response

from smolray import storage
from smolray.data.shards import MANIFEST, ShardError, ShardManifest, prepared_account, read_manifest
from smolray.web.files import NotFoundError, is_inside, is_name
from smolray.web.site import Ask, page

SHOWN_ROWS = 200  # of the quarantine
BINS = 12


class Prepared(NamedTuple):
    """One folder of shards: `folder` and `part` are its place below the storage's shards."""

    folder: str
    part: str
    manifest: ShardManifest

    @property
    def quarantined(self) -> int:
        """Rows that are not used."""
        return sum(self.manifest.quarantined.values())


class Bin(NamedTuple):
    """Conversations of `low` to `high` tokens; `width` in percent of the most."""

    low: int
    high: int
    conversations: int
    width: str


def show(ask: Ask) -> Response:
    """GET /data, or /data?folder=FOLDER&part=train for one."""
    root = storage.join(ask.site.root, "shards")
    if not ask.given("folder"):
        return page(ask, "data.html", "Data", found=list(_prepared(root)), root=root)

    name, part = ask.given("folder"), ask.given("part")
    uri = storage.join(root, name, part)
    if not (is_name(name) and is_name(part) and is_inside(ask.site.root, uri)):
        raise NotFoundError("there is no prepared data of this name")
    try:
        manifest = read_manifest(uri)
    except (ShardError, FileNotFoundError) as error:
        raise NotFoundError(str(error)) from None
    rows = quarantined_rows(uri)
    return page(
        ask,
        "data_set.html",
        f"{part} of {manifest.source}",
        part=part,
        manifest=manifest,
        lines=prepared_account(manifest).lines(part),
        rows=rows[:SHOWN_ROWS],
        bins=length_bins(token_lengths(uri)),
    )


def quarantined_rows(uri: str) -> list[dict[str, Any]]:
    """The first rows of the quarantine of a shard folder: place, id, reason, message."""
    rows: list[dict[str, Any]] = []
    for file in storage.list_files(storage.join(uri, "quarantine")):
        if len(rows) > SHOWN_ROWS:
            break
        rows += _table(
            storage.join(uri, "quarantine", file.base_name), ["place", "id", "reason", "message"]
        ).to_pylist()
    return rows


def token_lengths(uri: str) -> list[int]:
    """Tokens of each conversation, by the newest index of a shard folder; empty where there is none yet."""
    files = [f for f in storage.list_files(uri) if f.base_name.startswith("index-") and f.extension == "parquet"]
    if not files:
        return []
    newest = max(files, key=lambda file: file.mtime_ns or 0)
    return [n for n in _table(storage.join(uri, newest.base_name), ["tokens"])["tokens"].to_pylist() if n]


def length_bins(lengths: list[int]) -> list[Bin]:
    """A histogram of at most BINS bins of equal width."""
    if not lengths:
        return []
    low, high = min(lengths), max(lengths)
    width = max(1, -(-(high - low + 1) // BINS))
    counts = [0] * (-(-(high - low + 1) // width))
    for length in lengths:
        counts[(length - low) // width] += 1
    return [
        Bin(low + n * width, low + (n + 1) * width - 1, count, f"{100 * count / max(counts):.1f}")
        for n, count in enumerate(counts)
    ]


def _prepared(root: str) -> Iterator[Prepared]:
    for folder in storage.list_dirs(root):
        for part in ("train", "validation"):
            uri = storage.join(root, folder, part)
            if storage.exists(storage.join(uri, MANIFEST)):
                try:
                    yield Prepared(folder, part, read_manifest(uri))
                except ShardError:
                    continue  # its own page says what is wrong with it


def _table(uri: str, columns: list[str]) -> Any:
    fs, path = storage.filesystem(uri)
    return pq.read_table(path, columns=columns, filesystem=fs)
