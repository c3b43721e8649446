"""What a run is doing, read from its folder alone, without Ray.

In: the folder of a run. Out: a RunStatus; or a request to stop, as a flag file that the training loop polls.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from smolray import storage
from smolray.run.account import account_lines
from smolray.run.events import Event, EventTail, account_of, read_events, surviving
from smolray.run.folder import EVENTS, RunFolder
from smolray.run.lease import gone_owner
from smolray.run.progress import accuracy_of, gpus_text
from smolray.run.rates import rate, seconds_left
from smolray.run.result import RunFileError, reading

State = Literal["waiting", "preparing", "running", "stalled", "lost", "finished", "stopped", "failed"]
ENDED = ("finished", "stopped", "failed")
BEGINNINGS = ("preparing", "start", "resume")
RESIZED = "resized"  # the status of workers that saved and ended because RunFolder.resize_flag was there
# A run is called stalled after this long without an event, or after ten times its usual pause if that is longer.
STALLED_SECONDS = 120.0


class RunNotFoundError(ValueError):
    """There is no run of that name; the message lists those that are there."""


@dataclass(frozen=True)
class RunStatus:
    """One run by its events; None means not known yet. `data_wait_share` is 0..1; rates are over the newest steps."""

    name: str
    run_dir: str
    state: State
    stalled_seconds: float | None = None
    step: int = 0
    total_steps: int | None = None
    epoch: float | None = None
    loss: float | None = None
    samples_per_second: float | None = None
    tokens_per_second: float | None = None
    data_wait_share: float | None = None
    memory_bytes: int | None = None
    eta_seconds: float | None = None
    last_checkpoint: str | None = None
    accuracy: dict[str, float] | None = None
    accuracy_step: int | None = None
    attempts: int = 0
    restarts: int = 0
    workers: int | None = None
    gpus: str | None = None
    shares: tuple[int, ...] | None = None  # micro-batches of a step for each worker, where speed decides
    started: float | None = None
    updated: float | None = None
    stop_requested: bool = False
    error: str | None = None
    logs: str | None = None  # of the workers, a path on each node
    data: tuple[str, ...] = ()  # the account of its data in words
    waits_for: str | None = None  # the resources that it waits for, and who holds them
    driver: str | None = None  # who trained a run that is lost

    @property
    def ended(self) -> bool:
        return self.state in ENDED


def require_run(storage_uri: str, name: str) -> str:
    """The folder of the run `name`. Raises RunNotFoundError, which lists the runs that exist."""
    folder = RunFolder(storage.join(storage_uri, name))
    if not folder.is_run():
        names = [n for n in storage.list_dirs(storage_uri) if RunFolder(storage.join(storage_uri, n)).is_run()]
        raise RunNotFoundError(
            f"no run {name!r} under {storage_uri}; there: {', '.join(names) or 'none'} "
            "(--storage or SMOLRAY_STORAGE chooses)"
        )
    return folder.uri


def run_status(run_dir: str, now: float | None = None) -> RunStatus:
    """Read the run's events. A run is `lost` when its driver is gone and has not said how it ended.

    Raises RunFileError where they are damaged.
    """
    with reading(run_dir):
        return _run_status(run_dir, now)


def _run_status(run_dir: str, now: float | None) -> RunStatus:
    written, now = read_events(run_dir), time.time() if now is None else now
    state, stalled = state_of(written, now)
    gone = None if state in ENDED else gone_owner(run_dir, now, STALLED_SECONDS)
    status = RunStatus(
        name=RunFolder(run_dir).name,
        run_dir=run_dir,
        state="lost" if gone else state,
        stalled_seconds=None if gone else stalled,
        driver=str(gone) if gone else None,
        stop_requested=stop_requested(run_dir),
    )
    if not written:
        return status

    events = surviving(written)
    status = replace(status, **_training_fields(events), **_evaluation_fields(events), **_worker_fields(events))
    if status.state not in ("running", "stalled"):
        status = replace(status, eta_seconds=None)
    return replace(
        status,
        attempts=len({e.get("attempt", 1) for e in written if e["event"] == "start"}),
        restarts=sum(e["event"] == "resume" for e in written),
        started=written[0]["time"],
        updated=written[-1]["time"],
        error=written[-1].get("error") if state == "failed" else None,
        data=tuple(account_lines(account_of(events))),
        waits_for=written[-1].get("what") if state == "waiting" else None,
        logs=next((e["logs"] for e in reversed(written) if e.get("logs")), None),
    )


def _training_fields(events: list[Event]) -> dict[str, Any]:
    """The fields from the steps of the surviving history."""
    steps = [e for e in events if e["event"] == "step"]
    last: Event = steps[-1] if steps else {}
    total_steps = _newest(events, "start").get("total_steps")
    memory = [e["memory_bytes"] for e in steps if e.get("memory_bytes")]
    return {
        "step": max((e.get("step") or 0 for e in events), default=0),
        "total_steps": total_steps,
        "epoch": last.get("epoch"),
        "loss": last.get("loss"),
        "samples_per_second": rate(steps, "samples"),
        "tokens_per_second": rate(steps, "tokens"),
        "data_wait_share": rate(steps, "data_wait_seconds"),
        "memory_bytes": max(memory, default=None),
        "eta_seconds": seconds_left(steps, total_steps),
    }


def _evaluation_fields(events: list[Event]) -> dict[str, Any]:
    """The newest checkpoint and evaluation."""
    evaluation = _newest(events, "evaluate")
    return {
        "last_checkpoint": _newest(events, "checkpoint").get("path"),
        "accuracy": accuracy_of(evaluation) or None,
        "accuracy_step": evaluation.get("step"),
    }


def _worker_fields(events: list[Event]) -> dict[str, Any]:
    """The workers of the newest attempt."""
    start = _newest(events, "start")
    attempt = [e for e in events if e.get("attempt") == start.get("attempt")]
    inventory, balance = _newest(attempt, "inventory"), _newest(attempt, "balance")
    return {
        "workers": start.get("workers"),
        "gpus": gpus_text(inventory) if inventory else None,
        "shares": tuple(balance["shares"]) if balance else None,
    }


def _newest(events: list[Event], kind: str) -> Event:
    """The last event of a kind; an empty one where there is none."""
    return next((e for e in reversed(events) if e["event"] == kind), {})


def list_runs(storage_uri: str) -> list[RunStatus]:
    """All runs under a storage folder, the most recently active first."""
    folders = [RunFolder(storage.join(storage_uri, name)) for name in storage.list_dirs(storage_uri)]
    return sorted((_status_or_error(f) for f in folders if f.is_run()), key=lambda s: -(s.updated or 0))


def _status_or_error(folder: RunFolder) -> RunStatus:
    """One run whose log is damaged does not hide the others."""
    try:
        return run_status(folder.uri)
    except RunFileError as error:
        return RunStatus(folder.name, folder.uri, "failed", error=str(error))


def request_stop(run_dir: str) -> None:
    """Request that the run saves and stops; the loop polls the flag."""
    storage.write_bytes(RunFolder(run_dir).stop_flag, f"{time.time()}\n".encode())


def stop_requested(run_dir: str) -> bool:
    """Whether a request to stop is open."""
    return storage.exists(RunFolder(run_dir).stop_flag)


def clear_stop(run_dir: str) -> None:
    """Withdraw the request, so that the next launch trains."""
    storage.delete(RunFolder(run_dir).stop_flag)


def wait_for_end(
    run_dir: str, seen: int, timeout: float, poll: float | None = None, file: str = EVENTS, kind: str = "end"
) -> Event | None:
    """Wait for an event of `kind` in `file` after its first `seen` events; None when `timeout` seconds have passed."""
    deadline = time.monotonic() + timeout
    pause = poll or (0.2 if storage.is_local(run_dir) else 2.0)
    while True:
        ends = [e for e in read_events(run_dir, file)[seen:] if e["event"] == kind]
        if ends or time.monotonic() >= deadline:
            return ends[0] if ends else None
        time.sleep(min(pause, max(0.0, deadline - time.monotonic())))


def follow_events(run_dir: str, poll: float | None = None) -> Iterator[Event]:
    """Events as they are written, from the first one; returns after an `end` that no later start follows."""
    pause, tail, last = poll or (0.5 if storage.is_local(run_dir) else 3.0), EventTail(run_dir), ""
    while True:
        for event in tail.new():
            yield event
            last = event["event"]
        if last == "end":
            return
        time.sleep(pause)


def state_of(written: Sequence[Event], now: float) -> tuple[State, float | None]:
    """The state by all or by the newest events, and for a stalled run the seconds without an event."""
    if not written:
        return "waiting", None

    begun = max((i for i, e in enumerate(written) if e["event"] in BEGINNINGS), default=-1)
    ended = max((i for i, e in enumerate(written) if e["event"] == "end"), default=-1)
    if ended > begun:
        status: Any = written[ended].get("status", "finished")
        return status, None

    if written[-1]["event"] in ("preparing", "waiting"):
        return written[-1]["event"], None
    quiet = now - written[-1]["time"]
    times = [e["time"] for e in written[begun:]] if begun >= 0 else []
    pauses = [after - before for before, after in pairwise(times)]
    usual = statistics.median(pauses[-50:]) if pauses else 0.0
    return ("stalled", quiet) if quiet > max(STALLED_SECONDS, 10 * usual) else ("running", None)
