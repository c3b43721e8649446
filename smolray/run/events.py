"""The run's log: one JSON object a line in `<run>/events.jsonl`, the truth that status, TensorBoard and the report
read.

In: events of rank 0. Out: the surviving history, in which a resume takes back the steps after its checkpoint.

Kinds: workers (why: so many of them), start (config, versions, workers, total_steps), resume (step, position), step (step, position, epoch, loss,
grad_norm, learning_rate, samples, tokens, label_tokens, seconds, data_wait_seconds, memory_bytes, eta_seconds),
evaluate (step, accuracy, samples), inventory (workers, links), plan (words, settings, strategies), deal
(tokens_per_second, shares), checkpoint (step, path), skipped (what, why), resize (step: saved there to go on with more
workers), end (status: finished | stopped | failed, step, seconds). Every event has `time` (s since 1970) and `attempt`
(1, 2, …).
"""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from smolray import storage
from smolray.run.folder import EVENTS, RunFolder

Event = dict[str, Any]


class EventLog:
    """Appends events of one attempt.

    Remote storage has no append: the file is written anew, at most every `flush_seconds`.
    """

    def __init__(self, run_dir: str, flush_seconds: float = 5.0, file: str = EVENTS):
        self.uri = storage.join(run_dir, file)
        self.flush_seconds = flush_seconds if not storage.is_local(run_dir) else 0.0
        self._lines = [json.dumps(e) for e in read_events(run_dir, file)]
        self.attempt = 1 + sum('"event": "start"' in line for line in self._lines)
        self._torn = _is_torn(self.uri)
        self._flushed = 0.0
        self._written = len(self._lines)

    def write(self, event: str, **fields: Any) -> None:
        """Add an event. One that a full storage does not take is kept, and written with a later one."""
        self._lines.append(
            json.dumps({"event": event, "time": round(time.time(), 3), "attempt": self.attempt, **fields})
        )
        if time.monotonic() - self._flushed >= self.flush_seconds:
            with contextlib.suppress(storage.StorageFullError):
                self.flush()

    def flush(self) -> None:
        """Write what has not been. Raises StorageFullError."""
        if self._written == len(self._lines):
            return
        if storage.is_local(self.uri):
            fresh = "".join(line + "\n" for line in self._lines[self._written :])
            storage.append_text(self.uri, ("\n" if self._torn else "") + fresh)
        else:
            storage.write_bytes(self.uri, ("\n".join(self._lines) + "\n").encode())
        self._torn = False
        self._written, self._flushed = len(self._lines), time.monotonic()


def read_events(run_dir: str, file: str = EVENTS) -> list[Event]:
    """All events as written, those that a later resume took back included; a torn last line is left out."""
    try:
        return parse_events(storage.read_bytes(storage.join(run_dir, file)))
    except FileNotFoundError:
        return []


def _is_torn(uri: str) -> bool:
    """Whether the process before died in the middle of a line."""
    path = Path(storage.absolute(uri))
    return storage.is_local(uri) and path.exists() and not path.read_bytes().endswith(b"\n")


class EventTail:
    """Events as they are added, from the first or, with `skip`, from now on.

    A local log is read from where it was left off.
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
    events = []
    for line in data.decode("utf-8", errors="replace").splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # the process died in the middle of this line
    return events


def surviving(events: list[Event]) -> list[Event]:
    """The history that the newest weights have lived: a resume takes back what came after its checkpoint."""
    kept: list[Event] = []
    for event in events:
        if event["event"] == "resume":
            kept = [e for e in kept if e["event"] == "start" or _before(e, event)]
        kept.append(event)
    return kept


def _before(event: Event, resume: Event) -> bool:
    """Steps are compared by position: one that overflowed in fp16 has the number of the step before it."""
    if "position" in event and "position" in resume:
        (epoch, consumed), (from_epoch, from_consumed) = event["position"], resume["position"]
        return bool(epoch < from_epoch or (epoch == from_epoch and consumed <= from_consumed))
    return bool(event.get("step", 0) <= resume["step"])
