"""Parquet files -> raw rows, in read tasks of a few row groups."""

import json
from collections.abc import Iterator
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq

from smolray.data.formats.source import SCAN_BYTES, Format, Raw, ReadTask, SourceError, open_source

BATCH_ROWS = 16


def cut_parquet(whole: ReadTask, size: int, task_bytes: int) -> Iterator[ReadTask]:
    """Ranges of row groups of about `task_bytes`. Raises SourceError where the footer cannot be read."""
    try:
        with open_source(whole.uri) as file:
            footer = pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(
            f"{whole.uri} is not a readable Parquet file ({error}); download it again or remove it from the source"
        ) from error

    start, first_row, row, held = 0, 0, 0, 0
    for group in range(footer.num_row_groups):
        row += footer.row_group(group).num_rows
        held += sum(footer.row_group(group).column(c).total_compressed_size for c in range(footer.num_columns))
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

        labels = _label_names(file.schema_arrow)
        try:
            for batch in file.iter_batches(
                batch_size=BATCH_ROWS, row_groups=range(task.start, task.stop), use_threads=False
            ):
                for raw in _batch_rows(batch, row):
                    yield _with_labels(raw, labels)
                row += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            for lost in range(row, stop):
                yield Raw(
                    lost, {}, reason="torn_file", message=f"{task.uri} cannot be read from about row {row} on: {error}"
                )


def _batch_rows(batch: pa.RecordBatch, first: int) -> Iterator[Raw]:
    try:
        for number, record in enumerate(batch.to_pylist()):
            yield Raw(first + number, record)
    except UnicodeDecodeError:  # one bad string makes to_pylist fail for all rows
        for number in range(batch.num_rows):
            try:
                yield Raw(first + number, batch.slice(number, 1).to_pylist()[0])
            except UnicodeDecodeError as error:
                yield Raw(first + number, {}, reason="bad_text", message=f"a text column is not UTF-8: {error}")


def _label_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Names of the Hugging Face ClassLabel columns, which are stored as numbers."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {
            name: f["names"] for name, f in features.items() if isinstance(f, dict) and f.get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}  # without the metadata labels stay numbers


def _with_labels(raw: Raw, labels: dict[str, list[str]]) -> Raw:
    named = {
        c: names[raw.record[c]]
        for c, names in labels.items()
        if isinstance(raw.record.get(c), int) and 0 <= raw.record[c] < len(names)
    }
    return replace(raw, record={**raw.record, **named}) if named else raw


PARQUET = Format("parquet", cut_parquet, read_parquet, suffixes=(".parquet",))
