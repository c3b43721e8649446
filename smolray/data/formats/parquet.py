"""Parquet files -> raw rows, in read tasks of a few row groups."""

from collections.abc import Iterator
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq

from smolray.data.formats.damage import damaged
from smolray.data.formats.source import SCAN_BYTES, Format, Raw, ReadTask, SourceError, open_source
from smolray.data.formats.tables import batch_rows, label_names

BATCH_ROWS = 16


def cut_parquet(whole: ReadTask, size: int, task_bytes: int) -> Iterator[ReadTask]:
    """Ranges of row groups of about `task_bytes`. Raises SourceError where the footer cannot be read."""
    try:
        with open_source(whole.uri) as file:
            footer = pq.read_metadata(file)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise SourceError(
            f"{whole.uri} is not a readable Parquet file ({error}); download it again or remove it from the source"
        ) from error

    in_groups = sum(footer.row_group(group).num_rows for group in range(footer.num_row_groups))
    if in_groups != footer.num_rows:
        fault = f"its footer says {footer.num_rows} rows, its row groups {in_groups}"
        raise damaged(whole.uri, fault, f"{abs(footer.num_rows - in_groups)} rows are lost")

    start, first_row, row, held = 0, 0, 0, 0
    for group in range(footer.num_row_groups):
        row += footer.row_group(group).num_rows
        # Not the sizes of its columns: where the footer is damaged, asking for one ends the process.
        held += footer.row_group(group).total_byte_size
        if held >= task_bytes or group == footer.num_row_groups - 1:
            yield replace(whole, start=start, stop=group + 1, first_row=first_row)
            start, first_row, held = group + 1, row, 0


def read_parquet(task: ReadTask) -> Iterator[Raw]:
    """Rows of the task's row groups, numbered through the file.

    Where pages are damaged, each lost row is a Raw with a reason.
    """
    row = task.first_row
    with open_source(task.uri) as stream:
        # pre_buffer would keep whole row groups in memory; without it pages are read as they are needed.
        file = pq.ParquetFile(stream, buffer_size=SCAN_BYTES, pre_buffer=False)
        stop = row + sum(file.metadata.row_group(g).num_rows for g in range(task.start, task.stop))

        labels = label_names(file.schema_arrow)
        error: Exception | str = "its pages hold fewer rows than its footer says"
        try:
            for batch in file.iter_batches(
                batch_size=BATCH_ROWS, row_groups=range(task.start, task.stop), use_threads=False
            ):
                yield from batch_rows(batch, row, labels)
                row += batch.num_rows
        except (pa.ArrowException, OSError, ValueError) as fault:
            error = fault
        for lost in range(row, stop):
            message = f"{task.uri} cannot be read from about row {row} on: {error}"
            yield Raw(lost, {}, reason="torn_file", message=message)


PARQUET = Format("parquet", cut_parquet, read_parquet, suffixes=(".parquet",))
