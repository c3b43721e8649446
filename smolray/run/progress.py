"""One line a step for people: in goes an event of the log, out comes text.

The loop prints it, `smolray logs` prints the same.
"""

import math
from typing import Any


def progress_line(event: dict[str, Any], total_steps: int | None = None) -> str:
    """`step 120/900  loss 0.4321  lr 9.1e-05  1.2k samples/s  34k tokens/s  wait 3%  1.4 GiB  eta 2m10s` for a step
    event.

    What the event lacks is left out. Other kinds of events are rendered by `event_line`.
    """
    total = event.get("total_steps", total_steps)
    parts = [f"step {event.get('step', '?')}{f'/{total}' if total else ''}"]
    if "epoch" in event:
        parts.append(
            f"epoch {event['epoch']:.3g}" if isinstance(event["epoch"], int | float) else f"epoch {event['epoch']}"
        )
    if event.get("loss") is not None:
        parts.append(f"loss {event['loss']:.4f}")
    if event.get("rewards/margins") is not None:  # of DPO, by TRL's names
        parts.append(
            f"margin {event['rewards/margins']:.3g}  preferred {100 * event.get('rewards/accuracies', 0):.0f}%"
        )
    if event.get("learning_rate") is not None:
        parts.append(f"lr {event['learning_rate']:.1e}")
    seconds = event.get("seconds") or 0
    if seconds > 0:
        parts += [
            f"{count(event[kind] / seconds)} {kind}/s" for kind in ("samples", "tokens") if event.get(kind) is not None
        ]
        if event.get("data_wait_seconds") is not None:
            parts.append(f"wait {100 * event['data_wait_seconds'] / seconds:.0f}%")
    if event.get("memory_bytes"):
        parts.append(size(event["memory_bytes"]))
    if event.get("eta_seconds") is not None:
        parts.append(f"eta {duration(event['eta_seconds'])}")
    return "  ".join(parts)


def event_line(event: dict[str, Any], total_steps: int | None = None) -> str:
    """Any event of the log as one line."""
    kind = event["event"]
    if kind == "step":
        return progress_line(event, total_steps)
    if kind == "start":
        return f"start   attempt {event.get('attempt', 1)}, {event.get('workers', '?')} worker(s), {event.get('total_steps', '?')} steps"
    if kind == "workers":
        return f"workers {event['why']}"
    if kind == "resume":
        return f"resume  from step {event['step']}"
    if kind == "evaluate":
        scores = [f"{name} {percent(value)}" for name, value in accuracy_of(event).items()]
        left = f", {event['left_out']} left out as too long" if event.get("left_out") else ""
        return f"eval    step {event.get('step', '?')}  accuracy {', '.join(scores) or '?'}  ({event.get('samples', '?')} samples{left})"
    if kind == "checkpoint":
        return f"saved   step {event.get('step', '?')}  {event.get('path', '')}"
    if kind == "inventory":
        return f"cards   {gpus_text(event)}"
    if kind == "balance":
        speeds = ", ".join(count(speed) for speed in event["tokens_per_second"])
        return f"dealt   {' + '.join(map(str, event['shares']))} micro-batches a step, by {speeds} tokens/s"
    if kind == "plan":
        lines = [f"again after {event['after']}"] if event.get("after") else []
        return "\n".join(f"plan    {line}" for line in [*lines, *event["words"].splitlines()])
    if kind == "skipped":
        return f"skipped {event.get('what', '?')}: {event.get('why', '?')}"
    if kind == "end":
        where = f" at step {event['step']} after {duration(event.get('seconds') or 0)}" if "step" in event else ""
        why = f": {event['error']}" if event.get("error") else ""
        return f"end     {event.get('status', '?')}{where}{why}"
    rest = ", ".join(f"{k}={v}" for k, v in event.items() if k not in ("event", "time", "attempt"))
    return f"{kind:7s} {rest}"


def gpus_text(inventory: dict[str, Any]) -> str:
    """An inventory event by node and link: `10.0.0.1: 2x NVIDIA L4 (22.1 GiB free, 48 TFLOP/s); 10.0.0.1 - 10.0.0.2:
    0.94 Gbit/s, 0.12 ms`.
    """
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for worker in inventory["workers"]:
        # `card`: how logs of before 2026-11-28 call it
        kinds.setdefault((worker["node"], worker.get("gpu") or worker["card"]), []).append(worker)
    parts = [
        f"{node}: {len(same)}x {gpu} ({size(min(w['memory'] for w in same))} free, {min(w['tflops'] for w in same):.3g} TFLOP/s)"
        for (node, gpu), same in kinds.items()
    ]
    for link in inventory["links"]:
        a, b = link["nodes"]
        where = f"inside {a}" if a == b else f"{a} - {b}"
        parts.append(f"{where}: {link['bandwidth'] * 8 / 1e9:.3g} Gbit/s, {link['latency'] * 1e3:.2g} ms")
    return "; ".join(parts)


def accuracy_of(record: dict[str, Any]) -> dict[str, float]:
    """The accuracies of an evaluate event or a result, `overall` first; a bare number is the overall one."""
    value = record.get("accuracy")
    if isinstance(value, int | float):
        return {"overall": float(value)}
    scores = value if isinstance(value, dict) else {}
    return {
        k: scores[k] for k in sorted(scores, key=lambda k: (k != "overall", k)) if isinstance(scores[k], int | float)
    }


def percent(share: float) -> str:
    """0.8813 -> 88.1 %"""
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
