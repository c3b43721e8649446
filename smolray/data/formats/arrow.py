"""Arrow files, as `datasets.save_to_disk` writes them -> raw rows. Both of Arrow's formats: streams and files."""

import json
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.fs as pafs

from smolray import storage
from smolray.data.formats.damage import damaged
from smolray.data.formats.listing import File
from smolray.data.formats.source import Format, Raw, ReadTask, SourceError
from smolray.data.formats.tables import batch_rows, label_names

STATE = "state.json"  # in each folder of a split that `save_to_disk` writes
SLICE_ROWS = 16
_FILE_MAGIC = b"ARROW1"
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


def cut_arrow(whole: ReadTask, size: int, task_bytes: int) -> Iterator[ReadTask]:
    """A stream can only be read from its start, so a file is one task."""
    yield whole


def read_arrow(task: ReadTask) -> Iterator[Raw]:
    """The rows of a file. Raises SourceError where it is damaged: Arrow has no checksums, so nothing of it counts."""
    row = 0
    try:
        with _open(task.uri) as file:
            for batch in _batches(task.uri, file):
                batch.validate(full=True)
                labels = label_names(batch.schema)
                for start in range(0, batch.num_rows, SLICE_ROWS):
                    yield from batch_rows(batch.slice(start, SLICE_ROWS), row + start, labels)
                row += batch.num_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, SourceError):
            raise
        raise damaged(task.uri, f"behind row {row}: {error}", "all rows from there on are lost") from error


def _open(uri: str) -> pa.NativeFile:
    """A local file is mapped: its batches may be larger than the memory."""
    fs, path = storage.filesystem(uri)
    return pa.memory_map(path) if isinstance(fs, pafs.LocalFileSystem) else fs.open_input_file(path)


def _batches(uri: str, file: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    if file.read(len(_FILE_MAGIC)) == _FILE_MAGIC:
        reader = pa.ipc.open_file(file)
        yield from (reader.get_batch(n) for n in range(reader.num_record_batches))
        return

    file.seek(0)
    yield from pa.ipc.open_stream(file)
    read = file.tell()
    file.seek(max(0, read - len(_STREAM_END)))
    if file.read(len(_STREAM_END)) != _STREAM_END or file.read(1):
        fault = f"at byte {read} of {file.size()} the stream has no end mark, or more is behind it"
        raise damaged(uri, fault, "the rows behind are lost")


def files_of_state(files: Sequence[File]) -> list[File]:
    """The files without those that are no part of their data set, such as the caches beside them.

    `state.json` lists the parts. Raises SourceError where one is missing.
    """
    folders = {file.uri.rpartition("/")[0]: list[File]() for file in files}
    for file in files:
        folders[file.uri.rpartition("/")[0]].append(file)
    return [file for folder, there in folders.items() for file in _parts(folder, there)]


def _parts(folder: str, there: list[File]) -> list[File]:
    state = storage.join(folder, STATE)
    if not storage.exists(state):
        return there
    try:
        parts = [str(part["filename"]) for part in json.loads(storage.read_bytes(state))["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(
            state, f"it does not list the data files ({error!r})", "which files count is not known"
        ) from error

    missing = sorted({*parts} - {file.uri.rpartition("/")[2] for file in there})
    if missing:
        raise damaged(folder, f"{STATE} lists {', '.join(missing[:3])}, which is not there", "its rows are lost")
    return [file for file in there if file.uri.rpartition("/")[2] in parts]


ARROW = Format("arrow", cut_arrow, read_arrow, suffixes=(".arrow",))
