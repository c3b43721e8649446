"""Rows of the shards by where they stand, read row group by row group, with the bytes counted.

In: MicroBatchSpecs. Out: their rows. Open files stay open in the process, so a footer is read once.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow.parquet as pq

from smolray import storage
from smolray.data.collate import Group
from smolray.data.plan import MicroBatchSpec
from smolray.data.sample import ShardRow
from smolray.data.shards import decode_rows

OPEN_FILES = 64


@dataclass
class ShardReader:
    """Reads from one shard folder; `files` are its shard names in manifest order."""

    folder: str
    files: tuple[str, ...]
    bytes_read: int = 0
    bytes_needed: int = 0
    _open: OrderedDict[int, pq.ParquetFile] = field(default_factory=OrderedDict)

    def groups(self, specs: Sequence[MicroBatchSpec]) -> list[list[Group]]:
        """The groups of each micro-batch; a row group that several of them need is read once."""
        wanted = {(g.shard, g.row_group) for spec in specs for g in spec.groups}
        rows = {place: self.row_group(*place) for place in sorted(wanted)}
        needed = {(g.shard, g.row_group, g.row): g.row_bytes for spec in specs for g in spec.groups}
        self.bytes_needed += sum(needed.values())
        return [[Group(rows[g.shard, g.row_group][g.row], g.conversations) for g in spec.groups] for spec in specs]

    def row_group(self, shard: int, row_group: int) -> list[ShardRow]:
        """All rows of one row group."""
        rows = decode_rows(self._file(shard).read_row_group(row_group))
        self.bytes_read += sum(sum(map(len, r.images)) + sum(len(c.to_json()) for c in r.conversations) for r in rows)
        return rows

    def row_groups(self, shard: int) -> int:
        """How many row groups a shard has."""
        return int(self._file(shard).num_row_groups)

    def _file(self, shard: int) -> pq.ParquetFile:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        fs, path = storage.filesystem(storage.join(self.folder, self.files[shard]))
        self._open[shard] = pq.ParquetFile(path, filesystem=fs)
        if len(self._open) > OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        return self._open[shard]
