"""What a run is doing, read from its folder alone: in goes a run folder, out comes a RunStatus; no Ray is asked.

Also the polite stop (a flag file that the loop polls) and the export of the surviving events to TensorBoard.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from smolray import storage
from smolray.run.events import Event, EventTail, read_events, surviving
from smolray.run.folder import EVENTS, RunFolder
from smolray.run.progress import accuracy_of, gpus_text

State = Literal["waiting", "running", "silent", "finished", "stopped", "failed"]
RESIZED = "resized"  # the status of workers that saved and ended because RunFolder.resize_flag was there
# A run is called silent after this long without an event, or after ten times its usual pause if that is longer.
STALLED_SECONDS = 120.0
RATE_EVENTS = 20  # rates are those of the last so many step events


class RunNotFoundError(ValueError):
    """There is no run of that name; the message lists those that are there."""


@dataclass(frozen=True)
class RunStatus:
    """One run as its events tell it; None is 'not known yet'. Shares are 0..1, rates per second over the last steps."""

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
    # micro-batches of a step that each worker takes, where they are dealt by speed
    shares: tuple[int, ...] | None = None
    started: float | None = None
    updated: float | None = None
    stop_requested: bool = False
    error: str | None = None

    @property
    def ended(self) -> bool:
        return self.state in ("finished", "stopped", "failed")


def require_run(storage_uri: str, name: str) -> str:
    """The folder of the run `name`. Raises RunNotFoundError, which lists the runs that exist."""
    folder = RunFolder(storage.join(storage_uri, name))
    if not folder.is_run():
        names = [n for n in storage.list_dirs(storage_uri) if RunFolder(storage.join(storage_uri, n)).is_run()]
        raise RunNotFoundError(
            f"no run {name!r} under {storage_uri}; there: {', '.join(names) or 'none'} (--storage or SMOLRAY_STORAGE chooses)"
        )
    return folder.uri


def run_status(run_dir: str, now: float | None = None) -> RunStatus:
    """Read the run's events. A folder without events is `waiting`: written by launch, its workers have not started."""
    written = read_events(run_dir)
    events = surviving(written)
    steps = [e for e in events if e["event"] == "step"]
    start: Event = next((e for e in reversed(events) if e["event"] == "start"), {})
    last: Event = steps[-1] if steps else {}
    checkpoint: Event = next((e for e in reversed(events) if e["event"] == "checkpoint"), {})
    evaluation: Event = next((e for e in reversed(events) if e["event"] == "evaluate"), {})
    attempt = [e for e in events if e.get("attempt") == start.get("attempt")]
    inventory: Event = next((e for e in reversed(attempt) if e["event"] == "inventory"), {})
    balance: Event = next((e for e in reversed(attempt) if e["event"] == "balance"), {})
    state, stalled = _state(written, time.time() if now is None else now)
    known = [e["memory_bytes"] for e in steps if e.get("memory_bytes")]
    return RunStatus(
        name=RunFolder(run_dir).name,
        run_dir=run_dir,
        state=state,
        stalled_seconds=stalled,
        step=max((e.get("step") or 0 for e in events), default=0),
        total_steps=start.get("total_steps"),
        epoch=last.get("epoch"),
        loss=last.get("loss"),
        samples_per_second=_rate(steps, "samples"),
        tokens_per_second=_rate(steps, "tokens"),
        data_wait_share=_rate(steps, "data_wait_seconds"),
        memory_bytes=max(known) if known else None,
        eta_seconds=_eta(steps, start.get("total_steps")) if state in ("running", "silent") else None,
        last_checkpoint=checkpoint.get("path"),
        accuracy=accuracy_of(evaluation) or None,
        accuracy_step=evaluation.get("step"),
        attempts=len({e.get("attempt", 1) for e in written if e["event"] == "start"}),
        restarts=sum(e["event"] == "resume" for e in written),
        workers=start.get("workers"),
        gpus=gpus_text(inventory) if inventory else None,
        shares=tuple(balance["shares"]) if balance else None,
        started=written[0]["time"] if written else None,
        updated=written[-1]["time"] if written else None,
        stop_requested=stop_requested(run_dir),
        error=written[-1].get("error") if state == "failed" else None,
    )


def list_runs(storage_uri: str) -> list[RunStatus]:
    """All runs under a storage folder, the most recently active first."""
    folders = [RunFolder(storage.join(storage_uri, name)) for name in storage.list_dirs(storage_uri)]
    return sorted((run_status(f.uri) for f in folders if f.is_run()), key=lambda s: -(s.updated or 0))


def request_stop(run_dir: str) -> None:
    """Ask the loop to save and stop; it looks every few steps."""
    storage.write_bytes(RunFolder(run_dir).stop_flag, f"{time.time()}\n".encode())


def stop_requested(run_dir: str) -> bool:
    """Has somebody asked, and nobody taken it back?"""
    return storage.exists(RunFolder(run_dir).stop_flag)


def clear_stop(run_dir: str) -> None:
    """Take the request back, so that the next launch trains on."""
    storage.delete(RunFolder(run_dir).stop_flag)


def wait_for_end(
    run_dir: str, seen: int, timeout: float, poll: float | None = None, file: str = EVENTS, kind: str = "end"
) -> Event | None:
    """The first `kind` of event in `file` after its first `seen` events, or None when `timeout` seconds have passed
    without one.
    """
    deadline = time.monotonic() + timeout
    pause = poll or (0.2 if storage.is_local(run_dir) else 2.0)
    while True:
        ends = [e for e in read_events(run_dir, file)[seen:] if e["event"] == kind]
        if ends or time.monotonic() >= deadline:
            return ends[0] if ends else None
        time.sleep(min(pause, max(0.0, deadline - time.monotonic())))


def follow_events(run_dir: str, poll: float | None = None) -> Iterator[Event]:
    """Events as they are written, from the first on; returns after the `end` event that no later start takes back."""
    pause, tail, last = poll or (0.5 if storage.is_local(run_dir) else 3.0), EventTail(run_dir), ""
    while True:
        for event in tail.new():
            yield event
            last = event["event"]
        if last == "end":
            return
        time.sleep(pause)


def export_tensorboard(run_dir: str, out: str) -> int:
    """Write the surviving history as TensorBoard scalars into the local folder `out`; returns the number of points.

    A second export adds to the folder, so give a new one. Raises RunNotFoundError where the run has no events.
    """
    from tensorboardX import SummaryWriter

    events = surviving(read_events(run_dir))
    if not events:
        raise RunNotFoundError(f"{run_dir} has no events to export yet")
    points = 0
    with SummaryWriter(out) as writer:
        for event in events:
            for tag, value in _scalars(event):
                writer.add_scalar(tag, value, global_step=event.get("step", 0), walltime=event["time"])
                points += 1
    return points


def _scalars(event: Event) -> Iterator[tuple[str, float]]:
    if event["event"] == "step":
        seconds = event.get("seconds") or 0
        # DPO's are rewards/… and logps/…
        of_objective = [name for name in event if name == "token_accuracy" or "/" in name]
        for name in ("loss", "grad_norm", "learning_rate", "epoch", *of_objective):
            if isinstance(event.get(name), int | float):
                yield f"train/{name}", event[name]
        if isinstance(event.get("memory_bytes"), int | float):
            yield "performance/memory_gib", event["memory_bytes"] / 2**30
        rates = (
            ("samples", "samples_per_second"),
            ("tokens", "tokens_per_second"),
            ("data_wait_seconds", "data_wait_share"),
        )
        for name, tag in rates if seconds > 0 else ():
            if isinstance(event.get(name), int | float):
                yield f"performance/{tag}", event[name] / seconds
    elif event["event"] == "evaluate":
        for name, value in accuracy_of(event).items():
            yield f"accuracy/{name.replace('/', '-')}", value


def _state(written: list[Event], now: float) -> tuple[State, float | None]:
    if not written:
        return "waiting", None
    begun = max((i for i, e in enumerate(written) if e["event"] in ("start", "resume")), default=-1)
    end = next((e for e in reversed(written) if e["event"] == "end"), None)
    if end is not None and written.index(end) > begun:
        status: Any = end.get("status", "finished")
        return status, None
    quiet = now - written[-1]["time"]
    pauses = (
        [b["time"] - a["time"] for a, b in zip(written[begun:], written[begun + 1 :], strict=False)]
        if begun >= 0
        else []
    )
    usual = statistics.median(pauses[-50:]) if pauses else 0.0
    return ("silent", quiet) if quiet > max(STALLED_SECONDS, 10 * usual) else ("running", None)


def _eta(steps: list[Event], total: int | None) -> float | None:
    """What is left at the mean pace of the newest steps; a single step says little."""
    window = steps[-RATE_EVENTS - 1 :]
    if not window or not total:
        return None
    done = window[-1]["step"] - window[0]["step"]
    if done <= 0:
        return window[-1].get("eta_seconds")
    return (total - window[-1]["step"]) * sum(e.get("seconds") or 0 for e in window[1:]) / done


def _rate(steps: list[Event], name: str) -> float | None:
    """The sum of `name` over the seconds of the newest step events; both cover the same span."""
    known = [(e[name], e["seconds"]) for e in steps[-RATE_EVENTS:] if e.get(name) is not None and e.get("seconds")]
    return sum(k[0] for k in known) / sum(k[1] for k in known) if known else None
