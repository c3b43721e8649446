"""The page Runs: all runs of the storage, live."""

import time
from typing import NamedTuple

from fastapi.responses import Response

from smolray.run.progress import count, duration, percent
from smolray.run.queue import Entry, places
from smolray.run.status import RunStatus
from smolray.web.live import Part, stream
from smolray.web.run_list import RunList
from smolray.web.site import Addresses, Ask, fragment, page

FIRST_PATIENCE, LIVE_PATIENCE = 0.4, 5.0  # seconds that a page, and its stream, wait for what is new


class Row(NamedTuple):
    """A run as the table shows it."""

    name: str
    path: str
    state: str
    note: str
    steps: str
    share: str
    loss: str
    accuracy: str
    speed: str
    wait: str
    eta: str
    updated: str


class QueueRow(NamedTuple):
    """A run in the queue. `waited`: how long it stands or stood in line."""

    place: str
    name: str
    path: str
    user: str
    priority: int
    workers: int
    waited: str


def show(ask: Ask) -> Response:
    """GET /."""
    parts = read_parts(ask.site.runs, FIRST_PATIENCE)
    return page(ask, "runs.html", "Runs", parts={part.id: part for part in parts}, storage=ask.site.root)


def live(ask: Ask) -> Response:
    """GET /live."""
    return stream(ask, lambda: read_parts(ask.site.runs, LIVE_PATIENCE))


def read_parts(runs: RunList, patience: float | None, where: Addresses | None = None) -> list[Part]:
    """The line above the table, the queue, the rows where they have changed places, and each row."""
    where = where or Addresses()
    rows = [row_of(run, where) for run in runs.look(patience)]
    cells = [Part(f"run:{row.name}", fragment("run_row.html", row=row)) for row in rows]
    names = "\n".join(row.name for row in rows)
    body = fragment("run_rows.html", parts=cells, unread=runs.unread)
    summary = fragment("runs_summary.html", rows=rows, unread=runs.unread, error=runs.error)
    queue = fragment("runs_queue.html", entries=queue_rows(runs, where))
    return [
        Part("summary", summary),
        Part("queue", queue),
        Part("rows", body, version=f"{names}\n\n{bool(rows)} {runs.unread}"),
        *cells,
    ]


def queue_rows(runs: RunList, where: Addresses) -> list[QueueRow]:
    """The queue of the storage, in its order."""
    now = time.time()
    return [
        QueueRow(place, one.run, where.run(one.run), one.user, one.priority, one.workers, _minutes(one, now))
        for place, one in places(runs.queue)
    ]


def _minutes(entry: Entry, now: float) -> str:
    """How long it has been queued, in steps in which a page may change."""
    seconds = max(0.0, (entry.turn or now) - entry.since)
    return duration(seconds - seconds % 60) if seconds >= 60 else "less than a minute"


def row_of(run: RunStatus, where: Addresses) -> Row:
    """The cells of a run; empty where nothing is known."""
    share = run.step / run.total_steps if run.total_steps else 0.0
    overall = (run.accuracy or {}).get("overall")
    note = f"no event for {duration(run.stalled_seconds)}" if run.stalled_seconds is not None else ""
    note = "stops as soon as it has saved" if run.stop_requested and not run.ended and run.state != "lost" else note
    return Row(
        name=run.name,
        path=where.run(run.name),
        state=run.state,
        note=note,
        steps=f"{run.step:,} / {run.total_steps:,}" if run.total_steps else f"{run.step:,}",
        share=f"{100 * min(max(share, 0.0), 1.0):.1f}",
        loss=f"{run.loss:.4f}" if run.loss is not None else "",
        accuracy=percent(overall) if overall is not None else "",
        speed=f"{count(run.samples_per_second)}" if run.samples_per_second is not None else "",
        wait=f"{100 * run.data_wait_share:.0f} %" if run.data_wait_share is not None else "",
        eta=duration(run.eta_seconds) if run.eta_seconds is not None else "",
        updated=time.strftime("%Y-%m-%d %H:%M", time.gmtime(run.updated)) if run.updated and run.ended else "",
    )
