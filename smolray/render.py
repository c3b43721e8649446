"""Tables of the command line: in go statuses, manifests and results, out come rich renderables and text."""

import time
from typing import Any

from rich.markup import escape
from rich.table import Table

from smolray.progress import accuracy_of, count, duration, percent, size
from smolray.status import RunStatus

COLOURS = {"running": "cyan", "finished": "green", "stopped": "yellow", "failed": "red", "silent": "red", "waiting": "dim"}


def runs_table(runs: list[RunStatus]) -> Table:
    """One line a run."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("run", "state", "step", "loss", "accuracy", "samples/s", "wait", "eta"):
        table.add_column(column, justify="left" if column in ("run", "state") else "right", overflow="fold")
    for run in runs:
        table.add_row(escape(run.name), _state(run), _steps(run), *(_or_dash(v) for v in _numbers(run)))
    return table


def run_details(run: RunStatus) -> Table:
    """All that is known of one run, what is not known left out."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    loss, accuracy, rate, wait, eta = _numbers(run)
    by_type = ", ".join(f"{k} {percent(v)}" for k, v in (run.accuracy or {}).items() if k != "overall")
    rows = {
        "run": escape(run.name),
        "error": f"[red]{escape(run.error)}[/]" if run.error else None,
        "folder": escape(run.run_dir),
        "state": _state(run),
        "step": _steps(run) + (f", epoch {run.epoch:g}" if run.epoch is not None else ""),
        "loss": loss,
        "speed": f"{rate} samples/s, {count(run.tokens_per_second)} tokens/s" if rate and run.tokens_per_second is not None else rate,
        "data wait": wait,
        "memory": size(run.memory_bytes) if run.memory_bytes else None,
        "eta": eta,
        "checkpoint": escape(run.last_checkpoint) if run.last_checkpoint else None,
        "accuracy": f"{accuracy} at step {run.accuracy_step}{f' ({escape(by_type)})' if by_type else ''}" if accuracy else None,
        "workers": str(run.workers) if run.workers else None,
        "attempts": f"{run.attempts}, {run.restarts} resumed" if run.attempts else None,
        "started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.started)) if run.started else None,
    }
    for key, value in rows.items():
        if value:
            table.add_row(key, value)
    return table


def accuracy_table(result: dict[str, Any]) -> Table:
    """Accuracy by question type with counts, the blind baseline under it."""
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


def manifests_table(manifests: dict[str, Any]) -> Table:
    """What `prepare` wrote, a line a split; `manifests` are shard Manifests by split."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("split", "rows", "conversations", "images", "files", "quarantined"):
        table.add_column(column, justify="left" if column in ("split", "quarantined") else "right")
    for split, manifest in manifests.items():
        bad = ", ".join(f"{reason} {rows}" for reason, rows in manifest.quarantined.items()) or "none"
        numbers = (manifest.rows, manifest.conversations, manifest.images, len(manifest.files))
        table.add_row(escape(split), *(f"{n:,}" for n in numbers), escape(bad))
    return table


def _state(run: RunStatus) -> str:
    note = f" for {duration(run.silent_seconds)}" if run.silent_seconds is not None else ""
    asked = ", stop asked" if run.stop_requested and not run.ended else ""
    return f"[{COLOURS[run.state]}]{run.state}{note}{asked}[/]"


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
