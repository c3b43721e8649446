"""The log of a run, `<run>/events.jsonl`: one JSON object per line. Status, TensorBoard and the report read it.

In: events of rank 0. Out: the surviving history: a resume discards the events after its checkpoint.

On object storage the log is a folder of parts, `<run>/events/` (run/parts.py), with one stream for each attempt: what a
worker of an attempt that is over still writes stands before all that a later attempt has written. A run that began with
an `events.jsonl` there keeps it, and goes on in parts.

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
- early_stopping: step, best (headline of the evaluations), worse (evaluations in a row that are not better)
- skipped: what, why
- resize: step (saved there, to continue with more workers)
- end: status (finished, stopped or failed), step, seconds
"""

import contextlib
import json
import time
from typing import Any

from smolray import storage
from smolray.run.folder import EVENTS, log_parts
from smolray.run.parts import PartsReader, line_log

Event = dict[str, Any]
STARTING = ("preparing", "data", "launch", "plan", "waiting", "resize")  # no worker trains after one of these
RENAMED = {"deal": "balance"}  # kinds in older logs


class EventLog:
    """Adds the events of one attempt to the log. On object storage it writes at most every `flush_seconds`."""

    def __init__(self, run_dir: str, flush_seconds: float = 5.0, file: str = EVENTS):
        tail = EventTail(run_dir, file=file)
        events = tail.new()
        self.attempt = 1 + sum(e["event"] == "start" for e in events)
        self.newest = events[-1]["event"] if events else ""  # its kind, before this log's own
        self.flush_seconds = flush_seconds if not storage.is_local(run_dir) else 0.0
        parts, stream = log_parts(run_dir, file), f"attempt-{self.attempt:05d}"
        self._file = line_log(storage.join(run_dir, file), parts, stream, tail.last + 1)
        self._flushed = 0.0

    def write(self, event: str, **fields: Any) -> None:
        """Add an event. One that a full storage does not take is kept, and written with a later one."""
        record = {"event": event, "time": round(time.time(), 3), "attempt": self.attempt, **fields}
        self._file.add(json.dumps(record))

        if time.monotonic() - self._flushed >= self.flush_seconds:
            with contextlib.suppress(storage.StorageFullError):
                self._write()

    def flush(self) -> None:
        """Write what has not been written, and merge what was written in many parts. Raises StorageFullError."""
        self._write()
        self._file.merge()

    def _write(self) -> None:
        self._file.flush()
        self._flushed = time.monotonic()


def read_events(run_dir: str, file: str = EVENTS) -> list[Event]:
    """All events as written, also those that a later resume discarded; a torn last line is left out."""
    return EventTail(run_dir, file=file).new()


class EventTail:
    """Reads events as they are added: from the first one, or with `skip` from now on.

    What the last call has read is not read again.
    """

    def __init__(self, run_dir: str, skip: bool = False, file: str = EVENTS):
        self.uri, self._offset = storage.join(run_dir, file), 0
        self._parts = None if storage.is_local(run_dir) else PartsReader(log_parts(run_dir, file))
        if skip:
            self.new()

    @property
    def last(self) -> int:
        """The highest number of an event in parts that was read."""
        return self._parts.last if self._parts else 0

    def new(self) -> list[Event]:
        """Whole events added since the last call."""
        data = self._added()
        end = data.rfind(b"\n") + 1
        whole = data if parse_events(data[end:]) else data[:end]
        self._offset += len(whole)
        lines = [line for _, line in self._parts.new()] if self._parts else []
        return parse_events(whole) + parse_events(b"\n".join(lines))

    def _added(self) -> bytes:
        """What the file of the log holds behind what was read."""
        fs, path = storage.filesystem(self.uri)
        try:
            with fs.open_input_file(path) as file:
                file.seek(self._offset)
                return file.read()
        except FileNotFoundError:
            return b""


def parse_events(data: bytes) -> list[Event]:
    """Events of JSON lines; a torn or damaged line is left out."""
    events: list[Event] = []
    for line in data.decode("utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            continue  # the process died in the middle of this line
        if isinstance(event, dict) and isinstance(event.get("event"), str):
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
