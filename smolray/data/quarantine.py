"""Bad rows of a read task, as the Parquet file that `prepare` leaves beside the shards.

In: a row's place, its own id, its fault. Out: the bytes of the file, and the first few rows.
"""

import io
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from smolray.data.formats.source import ReadTask
from smolray.data.sample import SampleError

EXAMPLES = 3
LONGEST_ID = 200
QUARANTINE_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("place", "id", "reason", "message", "file")] + [("row", pa.int64())]
)


class Quarantine:
    """Bad rows of a task, compressed as they come, and the first few for the message."""

    def __init__(self, task: ReadTask):
        self.task = task
        self.examples: list[tuple[str, str, str]] = []
        self.pending: list[dict[str, Any]] = []
        self.sink = io.BytesIO()
        self.writer: pq.ParquetWriter | None = None

    def __bool__(self) -> bool:
        return bool(self.examples)

    def add(self, place: str, own_id: str, error: SampleError, row: int) -> None:
        """Add a bad row. `place`: where it stands in the source; it is also the id of a row without one of its own."""
        message = str(error).encode(errors="backslashreplace").decode()
        own_id = own_id.encode(errors="backslashreplace").decode()[:LONGEST_ID]
        if len(self.examples) < EXAMPLES:
            self.examples.append((f"{place} (id {own_id})" if own_id else place, error.reason, message[:400]))
        record = {"place": place, "id": own_id or place, "reason": error.reason, "message": message}
        self.pending.append(record | {"file": self.task.name, "row": row})
        if len(self.pending) >= 1000:
            self._flush(self.pending)

    def _flush(self, rows: Iterable[dict[str, Any]]) -> None:
        self.writer = self.writer or pq.ParquetWriter(self.sink, QUARANTINE_SCHEMA, compression="zstd")
        self.writer.write_batch(pa.RecordBatch.from_pylist(list(rows), QUARANTINE_SCHEMA))
        self.pending = []

    def to_parquet(self) -> bytes:
        """The file, with all rows that were added."""
        self._flush(self.pending)
        if self.writer is not None:
            self.writer.close()
        return self.sink.getvalue()
