"""The report of a run as one HTML file that opens with no network.

In: events.jsonl, result.json, config.yaml and the newest predictions of a run folder, each of which may be missing, and
sample images. Out: `<run>/report.html`. Sample images are kept beside the predictions, so that the report can be
written again from the folder alone.
"""

import base64
import json
import time
from collections.abc import Callable, Iterable
from html import escape
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from smolray import storage
from smolray.evaluate.metrics import interval, shown
from smolray.report.charts import Point, Series, line_chart, smooth
from smolray.report.style import STYLE
from smolray.run.events import Event, read_events, surviving
from smolray.run.progress import accuracy_of, count, duration, event_line, percent, size

MAX_CARDS = 24
QUESTIONS_A_CARD = 6
IMAGES_FILE = "predictions/images.parquet"
MAGIC = {
    b"\x89PNG": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"RIFF": "image/webp",
    b"BM": "image/bmp",
}


class Words(NamedTuple):
    """What a page calls the share of right answers."""

    title: str
    headline: str
    asked: str
    share: str
    chart: str


ANSWERING = Words("Accuracy", "exact-match accuracy", "Questions", "Accuracy", "Validation accuracy")
SEARCHING = Words(
    "Search",
    "of the texts find their picture first (recall@1)",
    "Texts",
    "Found first",
    "Validation texts whose picture is found first",
)


def write_report(run_dir: str, images: dict[str, bytes] | None = None) -> str:
    """Write `<run_dir>/report.html` and return its URI.

    `images`: prediction key -> encoded image, best as thumbnails; None takes those that an earlier report was given.
    """
    if images is None:
        images = _read_images(run_dir)
    elif images:
        _write_images(run_dir, images)
    uri = storage.join(run_dir, "report.html")
    storage.write_bytes(uri, render(run_dir.rstrip("/").rsplit("/", 1)[-1], *_gather(run_dir), images).encode())
    return uri


def render(
    name: str,
    events: list[Event],
    result: dict[str, Any],
    config: dict[str, Any],
    predictions: list[dict[str, Any]],
    images: dict[str, bytes],
) -> str:
    """The page as text; pure. `events` are all as written, `predictions` rows of the predictions file."""
    history = surviving(events)
    body = [
        _head(name, history, result, config),
        _accuracy(history, result, config),
        _metrics(history, result),
        _curves(history, result, config),
        _samples(predictions, images),
        _happenings(events),
        _details(result, config, history),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)} · smolray</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


def _gather(run_dir: str) -> tuple[list[Event], dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    events = read_events(run_dir)
    result = _read(storage.join(run_dir, "result.json"), json.loads)
    started: Event = next((e for e in reversed(events) if e["event"] == "start"), {})
    config = _read(storage.join(run_dir, "config.yaml"), yaml.safe_load) or started.get("config") or {}
    files = [f for f in storage.list_files(storage.join(run_dir, "predictions")) if f.base_name.startswith("step-")]
    predictions: list[dict[str, Any]] = []
    if files:
        fs, path = storage.filesystem(storage.join(run_dir, "predictions", files[-1].base_name))
        with fs.open_input_file(path) as file:
            predictions = pq.read_table(
                file, columns=["id", "type", "question", "prediction", "answer", "correct", "key"]
            ).to_pylist()
    return events, result, config, predictions


def _read(uri: str, parse: Callable[[bytes], Any]) -> dict[str, Any]:
    try:
        return parse(storage.read_bytes(uri)) or {}
    except FileNotFoundError:
        return {}


def _read_images(run_dir: str) -> dict[str, bytes]:
    uri = storage.join(run_dir, IMAGES_FILE)
    if not storage.exists(uri):
        return {}
    table = pq.read_table(pa.BufferReader(storage.read_bytes(uri)))
    return dict(zip(table["key"].to_pylist(), table["image"].to_pylist(), strict=True))


def _write_images(run_dir: str, images: dict[str, bytes]) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table({"key": pa.array(list(images), pa.string()), "image": pa.array(list(images.values()), pa.binary())}),
        sink,
    )
    storage.write_bytes(storage.join(run_dir, IMAGES_FILE), sink.getvalue().to_pybytes())


def _head(name: str, history: list[Event], result: dict[str, Any], config: dict[str, Any]) -> str:
    ends = [i for i, e in enumerate(history) if e["event"] == "end"]
    starts = [i for i, e in enumerate(history) if e["event"] == "start"]
    ended = bool(ends) and (not starts or ends[-1] > starts[-1])
    status = (
        str(history[ends[-1]].get("status", "finished"))
        if ended
        else str(result.get("status") or ("running" if history else "no events"))
    )
    model, data, train = (config.get(k) or {} for k in ("model", "data", "train"))
    engine, lora = config.get("engine") or {}, config.get("lora")
    engine = {"name": engine} if isinstance(engine, str) else engine
    weights = f"LoRA r={lora.get('r')}" if lora else "full weights"
    start: Event = history[starts[-1]] if starts else {}
    facts = {
        "Model": model.get("path"),
        "Data": data.get("train"),
        "Method": f"{config.get('method', 'sft')}, {weights}" if config else None,
        "Engine": f"{engine.get('name', '')} stage {engine.get('stage', '?')}, {model.get('dtype', '?')}"
        if engine
        else None,
        "Workers": start.get("workers"),
        "Epochs": train.get("num_train_epochs"),
        "Started": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(history[0]["time"])) if history else None,
    }
    listed = "".join(
        f"<div><dt>{k}</dt><dd>{escape(str(v))}</dd></div>" for k, v in facts.items() if v not in (None, "")
    )
    badge = f'<span class="badge {escape(status, quote=True)}">{escape(status)}</span>'
    return f"<header><h1>{escape(name)} {badge}</h1><dl>{listed}</dl></header>"


def _accuracy(history: list[Event], result: dict[str, Any], config: dict[str, Any]) -> str:
    evaluated: Event = next((e for e in reversed(history) if e["event"] == "evaluate"), {})
    scores = accuracy_of(result) or accuracy_of(evaluated)
    last_step = max((e.get("step") or 0 for e in history), default=0)
    peak = result.get("peak_memory_bytes") or max((e.get("memory_bytes") or 0 for e in history), default=0)
    tiles = [
        ("samples", count(result["samples"]) if result.get("samples") else None),
        ("steps", str(result.get("steps") or last_step or "") or None),
        ("training", duration(result["train_seconds"]) if result.get("train_seconds") else None),
        ("in all", duration(result["seconds"]) if result.get("seconds") else None),
        ("peak memory", size(peak) if peak else None),
        ("waiting for data", percent(result["data_wait_share"]) if result.get("data_wait_share") is not None else None),
    ]
    numbers = "".join(f'<div class="tile"><b>{escape(v)}</b><span>{k}</span></div>' for k, v in tiles if v)
    if not scores:
        return f'<section><h2>So far</h2><p class="quiet">Not evaluated yet.</p><div class="tiles">{numbers}</div></section>'
    blind = result.get("blind_baseline")
    words = _words(config)
    headline = f'<div class="headline"><b>{percent(scores.get("overall", 0.0))}</b><span>{words.headline}</span></div>'
    if isinstance(blind, int | float):
        headline += f'<div class="headline beside"><b>{percent(blind)}</b><span>from the question alone, without the image</span></div>'
    counts = result.get("accuracy_counts") or evaluated.get("counts") or {}
    counts = {**counts, "overall": counts.get("overall") or sum(n for t, n in counts.items() if t != "overall") or None}
    rows = "".join(
        f'<tr{" class=all" if kind == "overall" else ""}><th scope="row">{escape(kind)}</th>'
        f"<td>{f'{counts[kind]:,}' if counts.get(kind) else ''}</td><td>{percent(score)}</td>"
        f'<td class="bar"><i style="width:{100 * min(max(score, 0), 1):.1f}%"></i></td></tr>'
        for kind, score in scores.items()
    )
    table = f"<table><thead><tr><th>Type</th><th>{words.asked}</th><th>{words.share}</th><th></th></tr></thead><tbody>{rows}</tbody></table>"
    return f'<section><h2>{words.title}</h2><div class="top"><div>{headline}</div>{table}</div><div class="tiles">{numbers}</div></section>'


def _words(config: dict[str, Any]) -> Words:
    return SEARCHING if config.get("method") == "retrieval" else ANSWERING


def _metrics(history: list[Event], result: dict[str, Any]) -> str:
    evaluated: Event = next((e for e in reversed(history) if e["event"] == "evaluate"), {})
    rows = "".join(
        f'<tr{" class=all" if kind == "overall" else ""}><th scope="row">{escape(f"{metric}, {kind}")}</th><td>{figure["samples"]:,}</td>'
        f"<td>{shown(metric, figure['value'])}</td><td>{interval(metric, figure)}</td></tr>"
        for metric, kinds in (result.get("metrics") or evaluated.get("metrics") or {}).items()
        for kind, figure in kinds.items()
    )
    head = "<thead><tr><th>Metric</th><th>Samples</th><th>Value</th><th>95 % interval</th></tr></thead>"
    return f"<section><h2>Metrics</h2><table>{head}<tbody>{rows}</tbody></table></section>" if rows else ""


def _points(events: Iterable[Event], value: Callable[[Event], Any]) -> tuple[Point, ...]:
    return tuple((e["step"], y) for e in events if (y := value(e)) is not None)


def _field(record: Callable[[Event], dict[str, Any]], name: str) -> Callable[[Event], Any]:
    """Reads `name` of what `record` makes of an event."""
    return lambda event: record(event).get(name)


def _curves(history: list[Event], result: dict[str, Any], config: dict[str, Any]) -> str:
    steps = [e for e in history if e["event"] == "step"]
    evaluations = [e for e in history if e["event"] == "evaluate" and "step" in e]
    marks = [(e["step"], f"restart from step {e['step']}") for e in history if e["event"] == "resume"]

    def rate(name: str) -> tuple[Point, ...]:
        return _points(
            steps, lambda e: e[name] / e["seconds"] if e.get(name) is not None and e.get("seconds") else None
        )

    loss = _points(steps, lambda e: e.get("loss"))
    smoothed = [Series("smoothed", smooth(loss))] if len(loss) > 20 else []
    charts = [line_chart("Training loss", [Series("loss", loss, faint=bool(smoothed)), *smoothed], marks=marks)]
    charts += _preference_charts(steps, marks)
    kinds = sorted({k for e in evaluations for k in accuracy_of(e)}, key=lambda k: (k != "overall", k))
    if kinds:
        lines = [Series(kind, _points(evaluations, _field(accuracy_of, kind)), dots=True) for kind in kinds[:6]]
        blind = result.get("blind_baseline")
        baseline = (float(blind), "without the image") if isinstance(blind, int | float) else None
        charts.append(line_chart(_words(config).chart, lines, "{:.0%}".format, marks, (None, 1.0), baseline))
    charts += [
        line_chart("Samples per second", [Series("samples/s", rate("samples"))], count, marks, (0.0, None)),
        line_chart(
            "Waiting for data, share of step time",
            [Series("wait", rate("data_wait_seconds"))],
            "{:.1%}".format,
            marks,
            (0.0, None),
        ),
    ]
    memory = _points(steps, lambda e: e["memory_bytes"] / 2**30 if e.get("memory_bytes") else None)
    if memory:
        charts.append(
            line_chart("Memory of a worker, GiB", [Series("memory", memory)], marks=marks, y_limits=(0.0, None))
        )
    return f'<section><h2>Training</h2><div class="charts">{"".join(charts)}</div></section>'


def _preference_charts(steps: list[Event], marks: list[tuple[int, str]]) -> list[str]:
    """Of DPO: rewards are beta x what the log-probability of an answer has gained on the reference model's."""
    curves = {name: _points(steps, _field(dict, f"rewards/{name}")) for name in ("chosen", "rejected", "accuracies")}
    if not curves["chosen"]:
        return []
    chosen, rejected, right = (
        Series(name, smooth(points) if len(points) > 20 else points) for name, points in curves.items()
    )
    return [
        line_chart("Reward margin: rewards of chosen and rejected answers", [chosen, rejected], marks=marks),
        line_chart("Pairs whose chosen answer has the higher reward", [right], "{:.0%}".format, marks, (None, 1.0)),
    ]


def _samples(predictions: list[dict[str, Any]], images: dict[str, bytes]) -> str:
    cards: dict[str, list[dict[str, Any]]] = {}
    for row in predictions:
        if not images or row["key"] in images:
            cards.setdefault(row["key"], []).append(row)
    if not cards:
        return ""
    shown = "".join(_card(rows[:QUESTIONS_A_CARD], images.get(key)) for key, rows in list(cards.items())[:MAX_CARDS])
    note = f"{min(len(cards), MAX_CARDS)} of {len({r['key'] for r in predictions}):,} validation images, newest evaluation."
    return f'<section><h2>Samples</h2><p class="quiet">{note}</p><div class="cards">{shown}</div></section>'


def _card(rows: list[dict[str, Any]], image: bytes | None) -> str:
    mime = next((m for magic, m in MAGIC.items() if image and image.startswith(magic)), None)
    picture = (
        f'<img alt="sample image" src="data:{mime};base64,{base64.b64encode(image).decode()}">'
        if image and mime
        else ""
    )
    lines = []
    for row in rows:
        right = bool(row["correct"])
        verdict = '<span class="right">✓ correct</span>' if right else '<span class="wrong">✗ incorrect</span>'
        truth = "" if right else f'<div class="truth">truth: {escape(str(row["answer"]))}</div>'
        lines.append(
            f'<li><div class="question">{escape(str(row["question"]))}</div>'
            f"<div>{escape(str(row['prediction'])) or '<i>(nothing)</i>'} {verdict}</div>{truth}</li>"
        )
    return f'<article class="card">{picture}<ul>{"".join(lines)}</ul></article>'


def _happenings(events: list[Event]) -> str:
    told = [e for e in events if e["event"] != "step"]
    if not told:
        return ""
    rows = "".join(
        f'<tr class="{escape(e["event"], quote=True)}"><td>{time.strftime("%H:%M:%S", time.gmtime(e["time"]))}</td>'
        f"<td>{escape(event_line(e))}</td></tr>"
        for e in told[-200:]
    )
    restarts = sum(e["event"] == "resume" for e in events)
    title = f"Events{f', {restarts} restart' + ('s' if restarts > 1 else '') if restarts else ''}"
    return f'<section><details{" open" if restarts else ""}><summary>{title}</summary><table class="events">{rows}</table></details></section>'


def _details(result: dict[str, Any], config: dict[str, Any], history: list[Event]) -> str:
    start: Event = next((e for e in reversed(history) if e["event"] == "start"), {})
    versions = result.get("versions") or start.get("versions") or {}
    blocks = [("Configuration", config), ("Versions", versions)]
    return "".join(
        f"<section><details><summary>{title}</summary>"
        f"<pre>{escape(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))}</pre></details></section>"
        for title, content in blocks
        if content
    )
