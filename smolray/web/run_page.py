"""The page of one run, live: state, curves, answers with images, events and log; and its buttons.

In: a run's name. Out: the page, its changes, its report and images; a request to stop, or a command that was started.
"""

import time
from typing import Any, NamedTuple

from fastapi.responses import RedirectResponse, Response
from markupsafe import Markup

from smolray.report import sections
from smolray.report.sections import MAX_CARDS, QUESTIONS_PER_CARD, RunContents
from smolray.run.progress import duration, event_line, percent
from smolray.run.result import reading
from smolray.run.status import RunStatus, request_stop, run_status
from smolray.web.files import NotFoundError, read_inside, run_folder
from smolray.web.live import Part, stream
from smolray.web.processes import Started
from smolray.web.runs_page import Row, row_of
from smolray.web.site import Addresses, Ask, Site, fragment, page, run_path

LOG_LINES = 300
REPORT_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"


class Actions(NamedTuple):
    """Which buttons do something now."""

    stop: bool = False
    resume: bool = False
    export: bool = False


class Card(NamedTuple):
    """A validation image with some of its questions. `image`: its address, empty where there is none."""

    image: str
    predictions: list[dict[str, Any]]


def show(ask: Ask) -> Response:
    """GET /runs/NAME. A run that was started from here has a page before it has a folder."""
    parts = read_parts(ask.site, ask.name, ask.session.may("operate"))
    return page(ask, "run.html", ask.name, name=ask.name, path=run_path(ask.name), parts={p.id: p for p in parts})


def live(ask: Ask) -> Response:
    """GET /runs/NAME/live."""
    may_operate = ask.session.may("operate")
    read_parts(ask.site, ask.name, may_operate)  # a run that is not there is told now
    return stream(ask, lambda: read_parts(ask.site, ask.name, may_operate))


def report(ask: Ask) -> Response:
    """GET /runs/NAME/report: the file as it is, which may run nothing."""
    html = read_inside(ask.site.root, run_folder(ask.site.root, ask.name).report)
    return Response(html, media_type="text/html", headers={"content-security-policy": REPORT_POLICY})


def image(ask: Ask) -> Response:
    """GET /runs/NAME/image?key=KEY: a validation image that the page shows."""
    data = ask.site.views.of(run_folder(ask.site.root, ask.name)).images.get(ask.given("key"), b"")
    kind = next((kind for magic, kind in sections.IMAGE_TYPES.items() if data.startswith(magic)), None)
    if kind is None:
        raise NotFoundError("there is no such image, or it is of a format that browsers do not show")
    return Response(data, media_type=kind, headers={"cache-control": "private, max-age=3600"})


def stop(ask: Ask) -> Response:
    """POST /runs/NAME/stop: what `smolray stop` writes."""
    folder = run_folder(ask.site.root, ask.name)
    if not run_status(folder.uri).ended:
        request_stop(folder.uri)
    return _back(ask)


def resume(ask: Ask) -> Response:
    """POST /runs/NAME/resume."""
    run_folder(ask.site.root, ask.name)
    ask.site.processes.start(ask.name, [*_words(ask.site, "resume", ask.name), *_where(ask.site)])
    return _back(ask)


def export(ask: Ask) -> Response:
    """POST /runs/NAME/export."""
    run_folder(ask.site.root, ask.name)
    ask.site.processes.start(ask.name, _words(ask.site, "export", ask.name))
    return _back(ask)


def read_parts(site: Site, name: str, may_operate: bool) -> list[Part]:
    """The parts of the page. Raises NotFoundError."""
    started = site.processes.of(name)
    try:
        folder = run_folder(site.root, name)
    except NotFoundError:
        if not started:
            raise
        return [Part("head", fragment("run_begins.html", name=name)), _commands(started)]

    with reading(folder.uri):
        status, run = site.runs.status(name) or run_status(folder.uri), site.views.of(folder).contents()
        return [
            Part("actions", _actions(status, started, may_operate)),
            _commands(started),
            *contents_parts(status, run, Addresses()),
        ]


def contents_parts(status: RunStatus, run: RunContents, where: Addresses) -> list[Part]:
    """The parts that show what is in the folder of a run."""
    row = row_of(status, where)
    return [
        Part("head", fragment("run_head.html", row=row, facts=sections.facts(run), status=status)),
        Part("now", fragment("run_now.html", tiles=_tiles(row, status, run), scores=sections.scores(run))),
        Part("charts", fragment("charts.html", charts=sections.charts(run))),
        Part("answers", fragment("run_answers.html", **_answers(run, where))),
        Part("events", fragment("run_events.html", events=sections.event_rows(run))),
        Part("log", fragment("run_log.html", lines=_log_lines(run), logs=status.logs)),
        Part("details", fragment("run_details.html", details=sections.details(run), data=sections.data_lines(run))),
    ]


def possible_actions(status: RunStatus, started: list[Started]) -> Actions:
    """What can be done with a run now."""
    rests = status.ended or status.state == "lost"
    if not rests:
        return Actions(stop=not status.stop_requested)
    if any(one.state == "running" for one in started):
        return Actions()
    return Actions(resume=status.state != "finished", export=status.last_checkpoint is not None)


def _actions(status: RunStatus, started: list[Started], may_operate: bool) -> str:
    actions = possible_actions(status, started)
    report = Addresses().report(status.name) if status.ended and status.state != "failed" else ""
    return fragment(
        "run_actions.html", actions=actions, may_operate=may_operate, path=run_path(status.name), report=report
    )


def _commands(started: list[Started]) -> Part:
    shown = [(one, one.last_lines if one.state != "running" else Markup()) for one in started[:3]]
    return Part("commands", fragment("run_commands.html", commands=shown))


def _tiles(row: Row, status: RunStatus, run: RunContents) -> dict[str, str]:
    known = {
        "step": row.steps if status.step else "",
        "loss": row.loss,
        "samples/s": row.speed,
        "waiting for data": row.wait,
        "time left": row.eta,
        "exact match": row.accuracy,
        "without the image": percent(blind) if (blind := sections.blind(run)) is not None else "",
        "training": duration(run.result["train_seconds"]) if run.result.get("train_seconds") else "",
        "memory of a worker": f"{status.memory_bytes / 2**30:.2f} GiB" if status.memory_bytes else "",
        "restarts": str(status.restarts) if status.restarts else "",
    }
    return {label: value for label, value in known.items() if value}


def _answers(run: RunContents, where: Addresses) -> dict[str, Any]:
    by_key: dict[str, list[dict[str, Any]]] = {}
    for row in run.predictions:
        if not run.images or row["key"] in run.images:
            by_key.setdefault(row["key"], []).append(row)
    cards = [
        Card(where.image(run.name, key) if key in run.images else "", rows[:QUESTIONS_PER_CARD])
        for key, rows in list(by_key.items())[:MAX_CARDS]
    ]
    right = sum(bool(row["correct"]) for row in run.predictions)
    return {
        "cards": cards,
        "questions": len(run.predictions),
        "right": right,
        "wrong": len(run.predictions) - right,
    }


def _log_lines(run: RunContents) -> str:
    total, lines = None, []
    for event in run.events:
        total = event.get("total_steps", total)
    for event in run.events[-LOG_LINES:]:
        lines.append(f"{time.strftime('%H:%M:%S', time.gmtime(event['time']))}  {event_line(event, total)}")
    return "\n".join(lines)


def _words(site: Site, command: str, name: str) -> list[str]:
    return [command, name, "--storage", site.root]


def _where(site: Site) -> list[str]:
    return ["--address", site.address] if site.address else []


def _back(ask: Ask) -> RedirectResponse:
    return RedirectResponse(run_path(ask.name), 303)
