"""The log of a run, `<run>/events.jsonl`: one JSON object per line. Status, TensorBoard and the report read it.

In: events of rank 0. Out: the surviving history: a resume discards the events after its checkpoint.

Every event has `event` (its kind), `time` (seconds since 1970) and `attempt` (1, 2, …). The kinds and their fields:

- preparing: nothing more; the driver has begun
- waiting: what (resources, and who holds them)
- launch: logs (where the workers' own output is), workers (why there are so many, where the launch chose it)
- data: train, validation: the account of each (run/account.py)
- start: config, versions, workers, total_steps, device
- resume: step, position, checkpoint
- inventory: workers, links
- plan: words, settings, strategies
- balance: tokens_per_second, shares (micro-batches of a step for each worker)
- step: step, position, epoch, loss, grad_norm, learning_rate, samples, tokens, label_tokens, seconds,
  data_wait_seconds, memory_bytes, eta_seconds
- evaluating: step (saved before)
- evaluate: step, accuracy, samples
- checkpoint: step, path
- skipped: what, why
- resize: step (saved there, to continue with more workers)
- end: status (finished, stopped or failed), step, seconds
"""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from smolray import storage
from smolray.run.folder import EVENTS, RunFolder
from smolray.run.lines import LineFile

Event = dict[str, Any]
RENAMED = {"deal": "balance"}  # kinds in older logs


class EventLog:
    """Adds the events of one attempt to the log.

    Storage that is not local has no append: the file is written again, at most every `flush_seconds`.
    """

    def __init__(self, run_dir: str, flush_seconds: float = 5.0, file: str = EVENTS):
        events = read_events(run_dir, file)
        self.attempt = 1 + sum(e["event"] == "start" for e in events)
        self.flush_seconds = flush_seconds if not storage.is_local(run_dir) else 0.0
        self._file = LineFile(storage.join(run_dir, file), map(json.dumps, events))
        self._flushed = 0.0

    def write(self, event: str, **fields: Any) -> None:
        """Add an event. One that a full storage does not take is kept, and written with a later one."""
        record = {"event": event, "time": round(time.time(), 3), "attempt": self.attempt, **fields}
        self._file.add(json.dumps(record))

        if time.monotonic() - self._flushed >= self.flush_seconds:
            with contextlib.suppress(storage.StorageFullError):
                self.flush()

    def flush(self) -> None:
        """Write what has not been written. Raises StorageFullError."""
        self._file.flush()
        self._flushed = time.monotonic()


def read_events(run_dir: str, file: str = EVENTS) -> list[Event]:
    """All events as written, also those that a later resume discarded; a torn last line is left out."""
    try:
        return parse_events(storage.read_bytes(storage.join(run_dir, file)))
    except FileNotFoundError:
        return []


class EventTail:
    """Reads events as they are added: from the first one, or with `skip` from now on.

    A local log is read from where the last call stopped.
    """

    def __init__(self, run_dir: str, skip: bool = False):
        self.run_dir, self._offset, self._count = run_dir, 0, 0
        if skip:
            self.new()

    def new(self) -> list[Event]:
        """Whole events added since the last call."""
        if not storage.is_local(self.run_dir):
            events = read_events(self.run_dir)
            added, self._count = events[self._count :], len(events)
            return added

        path = Path(storage.absolute(RunFolder(self.run_dir).events))
        if not path.exists():
            return []

        with path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return parse_events(whole)


def parse_events(data: bytes) -> list[Event]:
    """Events of JSON lines; a torn line is left out."""
    events: list[Event] = []
    for line in data.decode("utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue  # the process died in the middle of this line
        events.append(event | {"event": RENAMED.get(event["event"], event["event"])})
    return events


def surviving(events: list[Event]) -> list[Event]:
    """The history of the newest weights: a resume discards what came after its checkpoint. Starts are kept."""
    kept: list[Event] = []
    for event in events:
        if event["event"] == "resume":
            kept = [e for e in kept if e["event"] == "start" or _before(e, event)]
        kept.append(event)
    return kept


def account_of(events: list[Event]) -> dict[str, Any]:
    """The newest account of the run's data: train, validation (run/account.py). Empty where none was written."""
    event = next((e for e in reversed(events) if e["event"] == "data"), {})
    return {part: event[part] for part in ("train", "validation") if part in event}


def _before(event: Event, resume: Event) -> bool:
    """Steps are compared by position: one that overflowed in fp16 has the number of the step before it."""
    if "position" in event and "position" in resume:
        (epoch, consumed), (from_epoch, from_consumed) = event["position"], resume["position"]
        return bool(epoch < from_epoch or (epoch == from_epoch and consumed <= from_consumed))
    return bool(event.get("step", 0) <= resume["step"])
