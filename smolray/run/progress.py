"""Events of the log as lines for people, and the numbers in them.

In: an event. Out: text; a run prints it while it trains, and `smolray logs` prints the same.
"""

import math
from collections.abc import Callable
from typing import Any

from smolray.run.account import account_lines
from smolray.run.events import Event


def event_line(event: Event, total_steps: int | None = None) -> str:
    """Any event of the log as text, one line for most kinds."""
    kind = event["event"]
    if kind == "step":
        return progress_line(event, total_steps)
    label, text = LINES.get(kind, (kind, _other))
    return "\n".join(f"{label:7s} {line}" for line in text(event).splitlines())


def progress_line(event: Event, total_steps: int | None = None) -> str:
    """A step event as `step 120/900  loss 0.4321  lr 9.1e-05  1.2k samples/s  wait 3%  1.4 GiB  eta 2m10s`.

    What the event lacks is left out.
    """
    total = event.get("total_steps", total_steps)
    parts = [f"step {event.get('step', '?')}{f'/{total}' if total else ''}"]
    if "epoch" in event:
        epoch = event["epoch"]
        parts.append(f"epoch {epoch:.3g}" if isinstance(epoch, int | float) else f"epoch {epoch}")

    if event.get("loss") is not None:
        parts.append(f"loss {event['loss']:.4f}")
    if event.get("rewards/margins") is not None:  # methods that learn from pairs, by TRL's names
        preferred = 100 * event.get("rewards/accuracies", 0)
        parts.append(f"margin {event['rewards/margins']:.3g}  preferred {preferred:.0f}%")
    if event.get("learning_rate") is not None:
        parts.append(f"lr {event['learning_rate']:.1e}")

    parts += _speed(event)
    if event.get("memory_bytes"):
        parts.append(size(event["memory_bytes"]))
    if event.get("eta_seconds") is not None:
        parts.append(f"eta {duration(event['eta_seconds'])}")
    return "  ".join(parts)


def _speed(event: Event) -> list[str]:
    """What a step did per second, and the part of it that waited for data."""
    seconds = event.get("seconds") or 0
    if seconds <= 0:
        return []

    parts = [
        f"{count(event[kind] / seconds)} {kind}/s" for kind in ("samples", "tokens") if event.get(kind) is not None
    ]
    if event.get("data_wait_seconds") is not None:
        parts.append(f"wait {100 * event['data_wait_seconds'] / seconds:.0f}%")
    return parts


def _launch(event: Event) -> str:
    return "\n".join([*([event["workers"]] if "workers" in event else []), _logs(event)])


def _logs(event: Event) -> str:
    return f"the workers' own output: {event['logs']} on each node"


def _start(event: Event) -> str:
    workers, steps = event.get("workers", "?"), event.get("total_steps", "?")
    started = f"attempt {event.get('attempt', 1)}, {workers} worker(s), {steps} steps"
    optimizer = event.get("config", {}).get("optimizer", {})
    warmup = optimizer.get("warmup_steps", 0)
    if not warmup or steps == "?" or warmup < steps or optimizer.get("lr_scheduler_type") == "constant":
        return started

    return (
        f"{started}\nthe learning rate never reaches {optimizer.get('learning_rate')}: optimizer.warmup_steps = "
        f"{warmup}, and the run has {steps} steps; optimizer.warmup_steps=0 warms up by optimizer.warmup_ratio"
    )


def _evaluate(event: Event) -> str:
    scores = ", ".join(f"{name} {percent(value)}" for name, value in accuracy_of(event).items())
    left_out = f", {event['left_out']} left out as too long" if event.get("left_out") else ""
    samples = event.get("samples", "?")
    return f"step {event.get('step', '?')}  accuracy {scores or '?'}  ({samples} samples{left_out})"


def _early_stopping(event: Event) -> str:
    worse, best = event.get("worse", "?"), event.get("best")
    shown = f"{best:.4g}" if isinstance(best, int | float) else "?"
    return f"step {event.get('step', '?')}  {worse} evaluation(s) in a row not better than {shown}"


def _balance(event: Event) -> str:
    speeds = ", ".join(count(speed) for speed in event["tokens_per_second"])
    return f"{' + '.join(map(str, event['shares']))} micro-batches a step for workers of {speeds} tokens/s"


def _plan(event: Event) -> str:
    again = f"again after {event['after']}\n" if event.get("after") else ""
    return again + event["words"]


def _end(event: Event) -> str:
    where = f" at step {event['step']} after {duration(event.get('seconds') or 0)}" if "step" in event else ""
    why = f": {event['error']}" if event.get("error") else ""
    logs = f"\n{_logs(event)}" if event.get("logs") else ""
    return f"{event.get('status', '?')}{where}{why}{logs}"


def _other(event: Event) -> str:
    return ", ".join(f"{k}={v}" for k, v in event.items() if k not in ("event", "time", "attempt"))


def gpus_text(inventory: Event) -> str:
    """An inventory event by node and link.

    `10.0.0.1: 2x NVIDIA L4 (22.1 GiB free, 48 TFLOP/s); 10.0.0.1 - 10.0.0.2: 0.94 Gbit/s, 0.12 ms`
    """
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for worker in inventory["workers"]:
        gpu = worker.get("gpu") or worker["card"]  # `card`: its name in older logs
        kinds.setdefault((worker["node"], gpu), []).append(worker)

    parts = []
    for (node, gpu), workers in kinds.items():
        memory, tflops = min(w["memory"] for w in workers), min(w["tflops"] for w in workers)
        parts.append(f"{node}: {len(workers)}x {gpu} ({size(memory)} free, {tflops:.3g} TFLOP/s)")
    for link in inventory["links"]:
        a, b = link["nodes"]
        where = f"inside {a}" if a == b else f"{a} - {b}"
        parts.append(f"{where}: {link['bandwidth'] * 8 / 1e9:.3g} Gbit/s, {link['latency'] * 1e3:.2g} ms")
    return "; ".join(parts)


# Kind of event -> the first word of its line, and the rest of it.
LINES: dict[str, tuple[str, Callable[[Event], str]]] = {
    "start": ("start", _start),
    "data": ("data", lambda event: "\n".join(account_lines(event))),
    "launch": ("launch", _launch),
    "resume": ("resume", lambda event: f"from step {event['step']}"),
    "waiting": ("waiting", lambda event: f"for {event.get('what', '?')}"),
    "preparing": ("prepare", lambda event: "the data and the workers"),
    "evaluating": ("eval", lambda event: f"step {event.get('step', '?')}: answering the validation questions"),
    "evaluate": ("eval", _evaluate),
    "checkpoint": ("saved", lambda event: f"step {event.get('step', '?')}  {event.get('path', '')}"),
    "early_stopping": ("enough", _early_stopping),
    "inventory": ("GPUs", gpus_text),
    "balance": ("balance", _balance),
    "plan": ("plan", _plan),
    "skipped": ("skipped", lambda event: f"{event.get('what', '?')}: {event.get('why', '?')}"),
    "end": ("end", _end),
}


def accuracy_of(record: dict[str, Any]) -> dict[str, float]:
    """The accuracies in an evaluate event or a result, `overall` first; a bare number is the overall one."""
    value = record.get("accuracy")
    if isinstance(value, int | float):
        return {"overall": float(value)}
    scores = value if isinstance(value, dict) else {}
    return {
        k: scores[k] for k in sorted(scores, key=lambda k: (k != "overall", k)) if isinstance(scores[k], int | float)
    }


def percent(share: float) -> str:
    """As in 0.8813 -> 88.1 %."""
    return f"{100 * share:.1f} %"


def count(value: float) -> str:
    """1234.5 -> 1.2k; three digits at most, for rates and totals."""
    if not math.isfinite(value):
        return str(value)
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * scale:  # what would round to 1000 takes the next unit
            return f"{value / scale:.3g}{unit}"
    return f"{value:.3g}"


def size(value: float) -> str:
    """Bytes in GiB or MiB."""
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    """3725 -> 1h02m; 130 -> 2m10s; 4 -> 4s."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"
