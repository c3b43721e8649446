"""Which samples each step consumed: one JSON line per micro-batch and worker.

In: the StepInfo of each step. Out: `<run>/audit/attempt-00001-rank-0000.jsonl`, or parts of it on object storage
(run/parts.py). `consumed` reads them all back, without what a resume discarded.
"""

import contextlib
import json
from collections import defaultdict
from collections.abc import Iterator

from smolray import storage
from smolray.run.events import read_events
from smolray.run.folder import RunFolder
from smolray.run.parts import PartsReader, is_part, line_log
from smolray.train.step import StepInfo


class Audit:
    """A hook of the training loop that lists the samples of each step.

    Local storage has every step on disk before the next one, unless it is full. Other storage has them from each
    checkpoint on, and at the end.
    """

    def __init__(self, run_dir: str, attempt: int, rank: int):
        folder = RunFolder(run_dir)
        self._file = line_log(folder.audit_of(attempt, rank), folder.audit, f"attempt-{attempt:05d}-rank-{rank:04d}")
        self._local = storage.is_local(run_dir)

    def __call__(self, step_info: StepInfo) -> None:
        epoch = step_info.progress.epoch - step_info.end_of_epoch
        for number, ids in step_info.local.ids:
            record = {"step": step_info.progress.step, "epoch": epoch, "micro_batch": number, "ids": ids}
            self._file.add(json.dumps(record))

        if self._local:
            with contextlib.suppress(storage.StorageFullError):
                self.flush()

    def flush(self) -> None:
        """Write what has not been written. Raises StorageFullError."""
        self._file.flush()
        self._file.merge()


def consumed(run_dir: str) -> dict[int, list[tuple[int, str]]]:
    """Epoch -> (step, sample id) of the surviving history, in the order of steps."""
    resumes = {e["attempt"]: tuple(e["position"]) for e in read_events(run_dir) if e["event"] == "resume"}
    history: dict[int, list[tuple[int, str]]] = defaultdict(list)

    for stream, line in _lines(RunFolder(run_dir).audit):
        attempt = int(stream.split("-")[1])
        limit = min((position for later, position in resumes.items() if later > attempt), default=None)
        record = json.loads(line)
        if limit is None or (record["epoch"], record["micro_batch"]) < limit:
            history[record["epoch"]] += [(record["step"], one) for one in record["ids"]]
    return {epoch: sorted(rows) for epoch, rows in sorted(history.items())}


def _lines(folder: str) -> Iterator[tuple[str, bytes]]:
    """(attempt and rank, line) of all files and parts."""
    for info in storage.list_files(folder):
        if not is_part(info.base_name):
            for line in storage.read_bytes(storage.join(folder, info.base_name)).splitlines():
                yield info.base_name, line
    yield from PartsReader(folder).new()
