"""Which samples each step consumed: one JSON line per micro-batch and worker, and the surviving history read back from
them.

In: the Moments of a loop. Out: `<run>/audit/attempt-00001-rank-0000.jsonl`; `consumed` folds them, taking back what a
resume took back.
"""

import contextlib
import json
from collections import defaultdict

from smolray import storage
from smolray.run.events import read_events
from smolray.run.folder import RunFolder
from smolray.train.loop import StepInfo


class Audit:
    """A loop hook.

    On local storage every step is on disk before the next, unless it is full; elsewhere written at checkpoints and at
    the end.
    """

    def __init__(self, run_dir: str, attempt: int, rank: int):
        self.uri = RunFolder(run_dir).audit_of(attempt, rank)
        self.local = storage.is_local(run_dir)
        self.lines: list[str] = []
        self._written = 0

    def __call__(self, step_info: StepInfo) -> None:
        epoch = step_info.progress.epoch - step_info.end_of_epoch
        for number, ids in step_info.local.ids:
            self.lines.append(
                json.dumps({"step": step_info.progress.step, "epoch": epoch, "micro_batch": number, "ids": ids})
            )
        if self.local:
            with contextlib.suppress(storage.StorageFullError):
                self.flush()

    def flush(self) -> None:
        """Write what has not been. Raises StorageFullError."""
        if self._written == len(self.lines):
            return
        if self.local:
            storage.append_text(self.uri, "".join(line + "\n" for line in self.lines[self._written :]))
        else:
            storage.write_bytes(self.uri, ("\n".join(self.lines) + "\n").encode())
        self._written = len(self.lines)


def consumed(run_dir: str) -> dict[int, list[tuple[int, str]]]:
    """Epoch -> (step, sample id) of the surviving history, in the order of steps."""
    resumes = {e["attempt"]: tuple(e["position"]) for e in read_events(run_dir) if e["event"] == "resume"}
    history: dict[int, list[tuple[int, str]]] = defaultdict(list)
    folder = RunFolder(run_dir).audit
    for info in storage.list_files(folder):
        attempt = int(info.base_name.split("-")[1])
        limit = min((position for later, position in resumes.items() if later > attempt), default=None)
        for line in storage.read_bytes(storage.join(folder, info.base_name)).decode().splitlines():
            record = json.loads(line)
            if limit is None or (record["epoch"], record["micro_batch"]) < limit:
                history[record["epoch"]] += [(record["step"], one) for one in record["ids"]]
    return {epoch: sorted(rows) for epoch, rows in sorted(history.items())}
