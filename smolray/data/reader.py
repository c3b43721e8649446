"""Rows of the shards by their place, read row group by row group, with their sidecars; the bytes read are counted.

In: MicroBatchSpecs. Out: their rows. Open files stay open in the process, so a footer is read once.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from smolray.data.collate import Group
from smolray.data.image_features import decode_features
from smolray.data.plan import MicroBatchSpec
from smolray.data.sample import ShardRow
from smolray.data.shards import ShardError, decode_rows, read_manifest
from smolray.data.sidecar import open_table

OPEN_FILES = 64


@dataclass(frozen=True)
class Sidecars:
    """URIs of the sidecars to read with the shards; empty: none."""

    features: str = ""  # in place of the images (precompute/features.py)
    logps: str = ""  # of DPO's reference model (precompute/logps.py)


ALONE = Sidecars()


@dataclass
class ShardReader:
    """Reads from one shard folder; `files` are its shard names in manifest order.

    `bytes_read`, `bytes_needed`: of rows and their sidecars.
    """

    folder: str
    files: tuple[str, ...]
    sidecars: Sidecars = ALONE
    bytes_read: int = 0
    bytes_needed: int = 0
    _files: OrderedDict[tuple[str, int], pq.ParquetFile] = field(default_factory=OrderedDict)

    @classmethod
    def open(cls, folder: str, sidecars: Sidecars = ALONE) -> "ShardReader":
        """A reader of all shards that the manifest of `folder` names. Raises ShardError where there is none."""
        return cls(folder, tuple(file.name for file in read_manifest(folder).files), sidecars)

    def rows(self) -> Iterator[ShardRow]:
        """All rows of all shards, in order."""
        for shard in range(len(self.files)):
            for row_group in range(self.row_groups(shard)):
                yield from self.row_group(shard, row_group)

    def groups(self, specs: Sequence[MicroBatchSpec]) -> list[list[Group]]:
        """The groups of each micro-batch; a row group that several of them need is read once."""
        wanted = {(g.shard, g.row_group) for spec in specs for g in spec.groups}
        read = {place: self._groups(*place) for place in sorted(wanted)}
        needed = {(g.shard, g.row_group, g.row) for spec in specs for g in spec.groups}
        self.bytes_read += sum(size for groups in read.values() for _, size in groups)
        self.bytes_needed += sum(read[shard, row_group][row][1] for shard, row_group, row in needed)
        return [
            [replace(read[g.shard, g.row_group][g.row][0], conversations=g.conversations) for g in spec.groups]
            for spec in specs
        ]

    def row_group(self, shard: int, row_group: int, images: bool = True) -> list[ShardRow]:
        """All rows of one row group; without `images` theirs are left unread and empty."""
        return decode_rows(self._table(shard, row_group, images))

    def row_groups(self, shard: int) -> int:
        """How many row groups a shard has."""
        return int(self._file(self.folder, shard).num_row_groups)

    def _groups(self, shard: int, row_group: int) -> list[tuple[Group, int]]:
        """The rows of one row group, each with all its conversations and sidecar values, and the bytes of each."""
        features, logps = self.sidecars.features, self.sidecars.logps
        table = self._table(shard, row_group, images=not features)
        rows = decode_rows(table)
        groups = [Group(row, tuple(range(len(row.conversations)))) for row in rows]
        if features:
            decoded = decode_features(self._sidecar_rows(features, shard, row_group, rows))
            groups = [replace(group, features=found) for group, found in zip(groups, decoded, strict=True)]
        if logps:
            references = self._sidecar_rows(logps, shard, row_group, rows)["logps"].to_pylist()
            groups = [
                replace(group, reference=tuple((a, b) for a, b in found))
                for group, found in zip(groups, references, strict=True)
            ]
        texts = (sum(map(len, row)) for row in table["conversations"].to_pylist())
        return [(group, text + _image_and_sidecar_bytes(group)) for group, text in zip(groups, texts, strict=True)]

    def _table(self, shard: int, row_group: int, images: bool) -> pa.Table:
        table = self._file(self.folder, shard).read_row_group(
            row_group, columns=None if images else ["key", "conversations"]
        )
        return table if images else table.append_column("images", pa.array([[]] * len(table), pa.list_(pa.binary())))

    def _sidecar_rows(self, folder: str, shard: int, row_group: int, rows: Sequence[ShardRow]) -> pa.Table:
        """The same row group of a sidecar. Raises ShardError where it is of other rows."""
        table = self._file(folder, shard).read_row_group(row_group)
        if table["key"].to_pylist() != [row.key for row in rows]:
            raise ShardError(
                f"{folder}/{self.files[shard]}, row group {row_group}: other rows than in {self.folder}; delete "
                f"{folder} to have it made again"
            )
        return table

    def _file(self, folder: str, shard: int) -> pq.ParquetFile:
        place = (folder, shard)
        if place in self._files:
            self._files.move_to_end(place)
            return self._files[place]
        self._files[place] = open_table(folder, self.files[shard])
        if len(self._files) > OPEN_FILES:
            self._files.popitem(last=False)[1].close()
        return self._files[place]


def _image_and_sidecar_bytes(group: Group) -> int:
    return sum(map(len, group.row.images)) + sum(f.bits.nbytes for f in group.features) + 8 * len(group.reference)


@dataclass(frozen=True)
class Folders:
    """Where the launcher has put the data; `validation` may be empty."""

    train: str
    validation: str = ""
    sidecars: Sidecars = ALONE  # of `train`
    validation_sidecars: Sidecars = ALONE

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "Folders":
        """From what `asdict` makes of one."""
        return cls(
            plain["train"], plain["validation"], Sidecars(**plain["sidecars"]), Sidecars(**plain["validation_sidecars"])
        )
