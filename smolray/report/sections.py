"""The content of the sections of a run's report, as plain values for its template.

In: the contents of a run's folder. Out: facts, numbers, charts, sample cards and events. Pure.
"""

import base64
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import yaml
from markupsafe import Markup

from smolray.config import METHODS
from smolray.evaluate.measure import interval, shown
from smolray.report.charts import Point, Series, line_chart, smooth
from smolray.run.account import account_lines
from smolray.run.events import Event, account_of, surviving
from smolray.run.progress import accuracy_of, count, duration, event_line, percent, size

MAX_CARDS = 24
QUESTIONS_PER_CARD = 6
MAX_EVENTS = 200
CURVES = 6  # question types in the accuracy chart
SMOOTHED_ABOVE = 20  # points
IMAGE_TYPES = {
    b"\x89PNG": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"RIFF": "image/webp",
    b"BM": "image/bmp",
}


@dataclass(frozen=True)
class RunContents:
    """The content of a run's folder. Each part may be empty. `events` are all that were logged; `images` are by key."""

    name: str
    events: list[Event] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    predictions: list[dict[str, Any]] = field(default_factory=list)
    images: dict[str, bytes] = field(default_factory=dict)

    @cached_property
    def history(self) -> list[Event]:
        """The events of the newest weights, without those that a resume has discarded."""
        return surviving(self.events)

    @cached_property
    def start(self) -> Event:
        """The newest start, empty before the first."""
        return next((e for e in reversed(self.history) if e["event"] == "start"), {})

    @cached_property
    def evaluated(self) -> Event:
        """The newest evaluation, empty before the first."""
        return next((e for e in reversed(self.history) if e["event"] == "evaluate"), {})


class Wording(NamedTuple):
    """The words of the page for the fraction of right answers."""

    title: str
    headline: str
    unit: str
    share: str
    chart: str


WORDINGS = {
    "answers": Wording("Accuracy", "exact-match accuracy", "Questions", "Accuracy", "Validation accuracy"),
    "search": Wording(
        "Search",
        "of the texts find their image first (recall@1)",
        "Texts",
        "Found first",
        "Validation texts whose image is found first",
    ),
}


@dataclass(frozen=True)
class MetricRow:
    """A row of a table of metrics; `all`: over all question types."""

    name: str
    all: bool
    samples: str
    value: str
    interval: str = ""
    width: str = ""


@dataclass(frozen=True)
class Scores:
    """The accuracy over all, and by question type."""

    overall: str
    rows: list[MetricRow]


@dataclass(frozen=True)
class Card:
    """A sample image as a data URI, empty where there is none, with some of its predictions."""

    image: str
    predictions: list[dict[str, Any]]


@dataclass(frozen=True)
class EventRow:
    """An event as its time of day and a line of text."""

    kind: str
    time: str
    text: str


def wording(run: RunContents) -> Wording:
    """The words for the evaluation of this run."""
    return WORDINGS[METHODS[run.config.get("method", "sft")].evaluation]


def status(run: RunContents) -> str:
    """The state of the run: how its last attempt ended, or its state before the end."""
    last = next((e for e in reversed(run.history) if e["event"] in ("start", "end")), None)
    if last is not None and last["event"] == "end":
        return str(last.get("status", "finished"))
    return str(run.result.get("status") or ("running" if run.history else "no events"))


def facts(run: RunContents) -> dict[str, str]:
    """The model, the data and the main settings, for the head of the page. Unknown ones are left out."""
    model, data, train = (run.config.get(section) or {} for section in ("model", "data", "train"))
    lora, engine = run.config.get("lora"), run.config.get("engine") or {}
    engine = {"name": engine} if isinstance(engine, str) else engine
    weights = f"LoRA r={lora.get('r')}" if lora else "full weights"
    settings = f"{engine.get('name', '')} stage {engine.get('stage', '?')}, {model.get('dtype', '?')}"

    known = {
        "Model": model.get("path"),
        "Data": data.get("train"),
        "Method": f"{run.config.get('method', 'sft')}, {weights}" if run.config else None,
        "Engine": settings if engine else None,
        "Workers": run.start.get("workers"),
        "Epochs": train.get("num_train_epochs"),
        "Started": utc(run.history[0]["time"]) if run.history else None,
    }
    return {label: str(value) for label, value in known.items() if value not in (None, "")}


def utc(seconds: float) -> str:
    """A time as the head of a page shows it."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def scores(run: RunContents) -> Scores | None:
    """The newest accuracy, None before the first evaluation."""
    accuracy = accuracy_of(run.result) or accuracy_of(run.evaluated)
    if not accuracy:
        return None

    counts = dict(run.result.get("accuracy_counts") or run.evaluated.get("counts") or {})
    counts["overall"] = counts.get("overall") or sum(n for kind, n in counts.items() if kind != "overall")
    rows = [
        MetricRow(
            kind,
            kind == "overall",
            f"{counts[kind]:,}" if counts.get(kind) else "",
            percent(value),
            width=f"{100 * min(max(value, 0), 1):.1f}%",
        )
        for kind, value in accuracy.items()
    ]
    return Scores(percent(accuracy.get("overall", 0.0)), rows)


def blind(run: RunContents) -> float | None:
    """The accuracy without the image; None where it was not measured."""
    value = run.result.get("blind_baseline")
    return float(value) if isinstance(value, int | float) else None


def tiles(run: RunContents) -> dict[str, str]:
    """What the run cost: samples, steps, time and memory. Unknown ones are left out."""
    result = run.result
    last_step = max((e.get("step") or 0 for e in run.history), default=0)
    peak = result.get("peak_memory_bytes") or max((e.get("memory_bytes") or 0 for e in run.history), default=0)
    wait = result.get("data_wait_share")

    known = {
        "samples": count(result["samples"]) if result.get("samples") else "",
        "steps": str(result.get("steps") or last_step or ""),
        "training": duration(result["train_seconds"]) if result.get("train_seconds") else "",
        "in all": duration(result["seconds"]) if result.get("seconds") else "",
        "peak memory": size(peak) if peak else "",
        "waiting for data": percent(wait) if wait is not None else "",
    }
    return {label: value for label, value in known.items() if value}


def metrics(run: RunContents) -> list[MetricRow]:
    """Each metric by question type, with its interval."""
    found = run.result.get("metrics") or run.evaluated.get("metrics") or {}
    return [
        MetricRow(
            f"{metric}, {kind}",
            kind == "overall",
            f"{estimate['samples']:,}",
            shown(metric, estimate["value"]),
            interval(metric, estimate),
        )
        for metric, kinds in found.items()
        for kind, estimate in kinds.items()
    ]


def charts(run: RunContents) -> list[Markup]:
    """Loss, accuracy, throughput, waiting and memory by step."""
    steps = [e for e in run.history if e["event"] == "step"]
    restarts = [e["step"] for e in run.history if e["event"] == "resume"]
    waits = _rate(steps, "data_wait_seconds")
    memory = _points(steps, lambda e: e["memory_bytes"] / 2**30 if e.get("memory_bytes") else None)

    drawn = [_loss_chart(steps, restarts), *_preference_charts(steps, restarts), *_accuracy_charts(run, restarts)]
    samples = Series("samples/s", _rate(steps, "samples"))
    drawn += [
        line_chart("Samples per second", [samples], count, restarts, (0.0, None)),
        line_chart(
            "Waiting for data, fraction of step time", [Series("wait", waits)], "{:.1%}".format, restarts, (0.0, None)
        ),
    ]
    if memory:
        drawn.append(
            line_chart("Memory of a worker, GiB", [Series("memory", memory)], restarts=restarts, y_limits=(0.0, None))
        )
    return drawn


def cards(run: RunContents) -> list[Card]:
    """The first evaluated images with some of their questions."""
    by_key: dict[str, list[dict[str, Any]]] = {}
    for row in run.predictions:
        if not run.images or row["key"] in run.images:
            by_key.setdefault(row["key"], []).append(row)
    return [
        Card(data_uri(run.images.get(key)), rows[:QUESTIONS_PER_CARD]) for key, rows in list(by_key.items())[:MAX_CARDS]
    ]


def data_uri(image: bytes | None) -> str:
    """An encoded image for an `img` element; empty for a format that browsers do not show."""
    kind = next((kind for magic, kind in IMAGE_TYPES.items() if image and image.startswith(magic)), None)
    return f"data:{kind};base64,{base64.b64encode(image).decode()}" if image and kind else ""


def event_rows(run: RunContents) -> list[EventRow]:
    """The newest events except steps. Events that a resume has discarded are included."""
    others = [e for e in run.events if e["event"] != "step"]
    return [
        EventRow(e["event"], time.strftime("%H:%M:%S", time.gmtime(e["time"])), event_line(e))
        for e in others[-MAX_EVENTS:]
    ]


def data_lines(run: RunContents) -> list[str]:
    """What became of the data, in words. Empty for a run of a version that kept no account."""
    return account_lines(run.result.get("data") or account_of(run.history))


def details(run: RunContents) -> dict[str, str]:
    """Configuration and versions as YAML, by title."""
    blocks = {
        "Configuration": run.config,
        "Versions": run.result.get("versions") or run.start.get("versions") or {},
    }
    return {
        title: yaml.safe_dump(block, sort_keys=False, allow_unicode=True) for title, block in blocks.items() if block
    }


def _loss_chart(steps: list[Event], restarts: list[float]) -> Markup:
    loss = _points(steps, lambda e: e.get("loss"))
    if len(loss) <= SMOOTHED_ABOVE:
        return line_chart("Training loss", [Series("loss", loss)], restarts=restarts, log=True)
    series = [Series("loss", loss, colour=0, faint=True), Series("smoothed", smooth(loss), colour=0)]
    return line_chart("Training loss", series, restarts=restarts, log=True)


def _accuracy_charts(run: RunContents, restarts: list[float]) -> list[Markup]:
    evaluations = [e for e in run.history if e["event"] == "evaluate" and "step" in e]
    kinds = sorted({kind for e in evaluations for kind in accuracy_of(e)}, key=lambda kind: (kind != "overall", kind))
    if not kinds:
        return []

    lines = [Series(kind, _points(evaluations, _reader(accuracy_of, kind)), dots=True) for kind in kinds[:CURVES]]
    value = blind(run)
    baseline = (value, "without the image") if value is not None else None
    return [line_chart(wording(run).chart, lines, "{:.0%}".format, restarts, (None, 1.0), baseline)]


def _preference_charts(steps: list[Event], restarts: list[float]) -> list[Markup]:
    """The rewards of chosen and rejected answers, for methods that learn from pairs."""
    curves = {name: _points(steps, _reader(dict, f"rewards/{name}")) for name in ("chosen", "rejected", "accuracies")}
    if not curves["chosen"]:
        return []

    chosen, rejected, right = (
        Series(name, smooth(points) if len(points) > SMOOTHED_ABOVE else points) for name, points in curves.items()
    )
    title = "Reward margin: rewards of chosen and rejected answers"
    return [
        line_chart(title, [chosen, rejected], restarts=restarts),
        line_chart("Pairs whose chosen answer has the higher reward", [right], "{:.0%}".format, restarts, (None, 1.0)),
    ]


def _rate(steps: list[Event], name: str) -> tuple[Point, ...]:
    """`name` per second of each step."""
    return _points(steps, lambda e: e[name] / e["seconds"] if e.get(name) is not None and e.get("seconds") else None)


def _points(events: Iterable[Event], value: Callable[[Event], Any]) -> tuple[Point, ...]:
    return tuple((e["step"], y) for e in events if (y := value(e)) is not None)


def _reader(record: Callable[[Event], dict[str, Any]], name: str) -> Callable[[Event], Any]:
    """A function that reads `name` from what `record` makes of an event."""
    return lambda event: record(event).get(name)
