"""Tables of the command line.

In: statuses, manifests, results and comparisons. Out: rich tables.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from smolray.config import METRICS
from smolray.evaluate.bootstrap import Estimates
from smolray.evaluate.measure import interval, shown
from smolray.run.progress import accuracy_of, count, duration, percent, size
from smolray.run.queue import Entry, places
from smolray.run.status import RunStatus

if TYPE_CHECKING:
    from collections.abc import Mapping

    from smolray.evaluate.compare import Comparison
    from smolray.run.checkpoint import Checkpoint, CheckpointError


COLOURS = {
    "running": "cyan",
    "finished": "green",
    "stopped": "yellow",
    "failed": "red",
    "stalled": "red",
    "waiting": "dim",
    "preparing": "cyan",
    "lost": "red",
}


def runs_table(runs: list[RunStatus]) -> Table:
    """One row for each run."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("run", "state", "step", "loss", "accuracy", "samples/s", "wait", "eta"):
        table.add_column(column, justify="left" if column in ("run", "state") else "right", overflow="fold")

    for run in runs:
        table.add_row(escape(run.name), _state(run), _steps(run), *(_or_dash(v) for v in _numbers(run)))
    return table


def queue_table(entries: Sequence[Entry]) -> Table:
    """The queue of a storage, one row for each run."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("place", "run", "user", "priority", "workers", "queued for"):
        table.add_column(column, justify="left" if column in ("run", "user") else "right", overflow="fold")

    for place, entry in places(entries):
        waited = (entry.turn or time.time()) - entry.since
        numbers = (str(entry.priority), str(entry.workers), duration(waited))
        table.add_row(place, escape(entry.run), escape(entry.user), *numbers)
    return table


def run_details(run: RunStatus) -> Table:
    """All known facts of one run; unknown ones are left out."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")

    loss, accuracy, _, wait, eta = _numbers(run)
    rows = {
        "run": escape(run.name),
        "error": f"[red]{escape(run.error)}[/]" if run.error else None,
        "folder": escape(run.run_dir),
        "state": _state(run),
        "waits for": escape(run.waits_for) if run.waits_for else None,
        "driver": f"gone: {escape(run.driver)}" if run.driver else None,
        "step": _steps(run) + (f", epoch {run.epoch:g}" if run.epoch is not None else ""),
        "loss": loss,
        "speed": _speed(run),
        "data wait": wait,
        "memory": size(run.memory_bytes) if run.memory_bytes else None,
        "eta": eta,
        "checkpoint": escape(run.last_checkpoint) if run.last_checkpoint else None,
        "accuracy": f"{accuracy} at step {run.accuracy_step}{_by_type(run)}" if accuracy else None,
        "workers": str(run.workers) if run.workers else None,
        "GPUs": escape(run.gpus) if run.gpus else None,
        "balance": f"{' + '.join(map(str, run.shares))} micro-batches a step, by speed" if run.shares else None,
        "data": escape("\n".join(run.data)) if run.data else None,
        "worker logs": f"{escape(run.logs)} on each node" if run.logs else None,
        "attempts": f"{run.attempts}, {run.restarts} resumed" if run.attempts else None,
        "started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.started)) if run.started else None,
    }

    for key, value in rows.items():
        if value:
            table.add_row(key, value)
    return table


def accuracy_table(result: dict[str, Any]) -> Table:
    """Accuracy by question type with counts, and below it that of answering without the image."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("type")
    table.add_column("questions", justify="right")
    table.add_column("accuracy", justify="right")

    counts = result.get("accuracy_counts") or {}
    for kind, score in accuracy_of(result).items():
        number = counts.get(kind) or (sum(counts.values()) if kind == "overall" and "overall" not in counts else None)
        table.add_row(escape(kind), f"{number:,}" if number else "", percent(score))
    if isinstance(result.get("blind_baseline"), int | float):
        table.add_row("[dim]without the image[/dim]", "", f"[dim]{percent(result['blind_baseline'])}[/dim]")
    return table


def checkpoints_table(found: "Mapping[int, Checkpoint | CheckpointError]", best: int | None) -> Table:
    """One row for each checkpoint by its step; a damaged one with what is wrong."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("checkpoint", "epoch", "samples", "loss", "accuracy", ""):
        table.add_column(column, justify="right" if column in ("epoch", "samples", "loss", "accuracy") else "left")
    for step, one in found.items():
        name = f"step-{step:08d}"
        if isinstance(one, Exception):
            table.add_row(name, "", "", "", "", Text(f"damaged: {one}", style="red"))
            continue
        loss, accuracy = one.metrics.get("loss"), one.metrics.get("accuracy")
        progress = one.progress
        table.add_row(
            name,
            str(progress.epoch),
            f"{progress.samples:,}",
            _or_dash(None if loss is None else f"{loss:.4f}"),
            _or_dash(None if accuracy is None else percent(accuracy)),
            "best" if step == best else "",
        )
    return table


def metrics_table(metrics: dict[str, Estimates]) -> Table:
    """Each metric with its 95 % interval, over all and by question type. `metrics`: of an EvalReport or a result."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("metric", "type", "samples", "value", "95 % interval"):
        table.add_column(column, justify="left" if column in ("metric", "type") else "right")

    for metric, kinds in metrics.items():
        for kind, found in kinds.items():
            cells = (escape(kind), f"{found['samples']:,}", shown(metric, found["value"]), interval(metric, found))
            table.add_row(metric if kind == "overall" else "", *cells)
    return table


def comparison_table(comparison: "Comparison") -> Table:
    """Two checkpoints by question type.

    The columns: both values, the difference with its interval, questions gained and lost, and McNemar's p.
    """
    metric = comparison.metric
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in (metric, "n", "a", "b", "b - a", "95 % interval", "gained", "lost", "p"):
        table.add_column(column, justify="left" if column == metric else "right")

    for kind, change in comparison.by_type.items():
        certain = change.difference["low"] > 0 or change.difference["high"] < 0
        rose = change.difference["value"] > 0
        colour = ("green" if rose != METRICS[metric].error_rate else "red") if certain else "default"
        table.add_row(
            escape(kind),
            f"{change.a['samples']:,}",
            shown(metric, change.a["value"]),
            shown(metric, change.b["value"]),
            f"[{colour}]{shown(metric, change.difference['value'], sign=True)}[/]",
            interval(metric, change.difference, sign=True),
            f"{change.gained:,}",
            f"{change.lost:,}",
            f"{change.p_value:.2g}",
        )
    return table


def changes_table(comparison: "Comparison", limit: int = 10) -> Table:
    """The questions whose answer changed, at most `limit` gained and `limit` lost, with answers and references."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("", "question", "a", "b", "truth"):
        table.add_column(column, overflow="fold")

    for name, colour, records in (("gained", "green", comparison.gained), ("lost", "red", comparison.lost)):
        for record in records[:limit]:
            truth = ", ".join(dict.fromkeys(record["answers"]))
            table.add_row(
                f"[{colour}]{name}[/]", *(escape(record[part]) for part in ("question", "a", "b")), escape(truth)
            )
        if len(records) > limit:
            table.add_row("", f"[dim]and {len(records) - limit:,} more {name}[/]")
    return table


def manifests_table(manifests: dict[str, Any]) -> Table:
    """What `prepare` wrote, one row for each split; `manifests` are shard Manifests by split."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("split", "rows", "conversations", "images", "files", "quarantined"):
        table.add_column(column, justify="left" if column in ("split", "quarantined") else "right")

    for split, manifest in manifests.items():
        bad = ", ".join(f"{reason} {rows}" for reason, rows in manifest.quarantined.items()) or "none"
        numbers = (manifest.rows, manifest.conversations, manifest.images, len(manifest.files))
        table.add_row(escape(split), *(f"{n:,}" for n in numbers), escape(bad))
    return table


def _state(run: RunStatus) -> str:
    note = f" for {duration(run.stalled_seconds)}" if run.stalled_seconds is not None else ""
    asked = ", stop asked" if run.stop_requested and not run.ended else ""
    return f"[{COLOURS[run.state]}]{run.state}{note}{asked}[/]"


def _speed(run: RunStatus) -> str | None:
    if run.samples_per_second is None:
        return None
    samples = f"{count(run.samples_per_second)} samples/s"
    return samples if run.tokens_per_second is None else f"{samples}, {count(run.tokens_per_second)} tokens/s"


def _by_type(run: RunStatus) -> str:
    scores = ", ".join(f"{kind} {percent(value)}" for kind, value in (run.accuracy or {}).items() if kind != "overall")
    return f" ({escape(scores)})" if scores else ""


def _steps(run: RunStatus) -> str:
    return f"{run.step}/{run.total_steps}" if run.total_steps else str(run.step)


def _numbers(run: RunStatus) -> tuple[str | None, ...]:
    return (
        f"{run.loss:.4f}" if run.loss is not None else None,
        percent(run.accuracy["overall"]) if run.accuracy and "overall" in run.accuracy else None,
        count(run.samples_per_second) if run.samples_per_second is not None else None,
        f"{100 * run.data_wait_share:.0f} %" if run.data_wait_share is not None else None,
        duration(run.eta_seconds) if run.eta_seconds is not None else None,
    )


def _or_dash(value: str | None) -> str:
    return value or "–"
