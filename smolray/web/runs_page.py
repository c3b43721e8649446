"""The page Runs: all runs of the storage, live."""

import time
from typing import NamedTuple

from fastapi.responses import Response

from smolray.run.progress import count, duration, percent
from smolray.run.status import RunStatus
from smolray.web.live import Part, stream
from smolray.web.site import Ask, Site, fragment, page, run_path

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


def show(ask: Ask) -> Response:
    """GET /."""
    parts = read_parts(ask.site, FIRST_PATIENCE)
    return page(ask, "runs.html", "Runs", parts={part.id: part for part in parts}, storage=ask.site.root)


def live(ask: Ask) -> Response:
    """GET /live."""
    return stream(ask, lambda: read_parts(ask.site, LIVE_PATIENCE))


def read_parts(site: Site, patience: float) -> list[Part]:
    """The line above the table, the rows where they have changed places, and each row."""
    rows = [row_of(run) for run in site.runs.look(patience)]
    cells = [Part(f"run:{row.name}", fragment("run_row.html", row=row)) for row in rows]
    names = "\n".join(row.name for row in rows)
    body = fragment("run_rows.html", parts=cells, unread=site.runs.unread)
    summary = fragment("runs_summary.html", rows=rows, unread=site.runs.unread, error=site.runs.error)
    return [Part("summary", summary), Part("rows", body, version=f"{names}\n\n{bool(rows)} {site.runs.unread}"), *cells]


def row_of(run: RunStatus) -> Row:
    """The cells of a run; empty where nothing is known."""
    share = run.step / run.total_steps if run.total_steps else 0.0
    overall = (run.accuracy or {}).get("overall")
    note = f"no event for {duration(run.stalled_seconds)}" if run.stalled_seconds is not None else ""
    note = "stops as soon as it has saved" if run.stop_requested and not run.ended and run.state != "lost" else note
    return Row(
        name=run.name,
        path=run_path(run.name),
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
