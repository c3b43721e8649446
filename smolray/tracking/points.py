"""Events of the log as points of curves, the same for every tracker.

In: an event. Out: names as transformers has them (train/loss, eval/loss), and amounts per second.
"""

from collections.abc import Iterator

from smolray.run.events import Event
from smolray.run.progress import accuracy_of
from smolray.tracking.base import Point

TRAINING = ("loss", "grad_norm", "learning_rate", "epoch")
# field of a step event -> name of its amount per second
RATES = {"samples": "samples_per_second", "tokens": "tokens_per_second", "data_wait_seconds": "data_wait_share"}


def point_of(event: Event) -> Point | None:
    """The point that an event makes; None where it makes none."""
    values: dict[str, float] = {}
    if event["event"] == "step":
        values = dict(_step_values(event))
    elif event["event"] == "evaluate":
        values = dict(_evaluation_values(event))
    elif event["event"] == "checkpoint" and "validation_loss" in event:
        values = {"eval/loss": event["validation_loss"]}
    return Point(event["step"], event["time"], values) if values else None


def _step_values(event: Event) -> Iterator[tuple[str, float]]:
    numbers = {name: value for name, value in event.items() if isinstance(value, int | float)}

    of_objective = [name for name in numbers if name == "token_accuracy" or "/" in name]  # DPO: rewards/…, logps/…
    for name in (*TRAINING, *of_objective):
        if name in numbers:
            yield f"train/{name}", numbers[name]

    if "memory_bytes" in numbers:
        yield "performance/memory_gib", numbers["memory_bytes"] / 2**30
    seconds = numbers.get("seconds", 0)
    for name, tag in RATES.items():
        if name in numbers and seconds > 0:
            yield f"performance/{tag}", numbers[name] / seconds


def _evaluation_values(event: Event) -> Iterator[tuple[str, float]]:
    """Exact match as eval/accuracy, by type below it; every other metric by its name."""
    for kind, value in accuracy_of(event).items():
        yield _tag("accuracy", kind), value
    for metric, by_type in (event.get("metrics") or {}).items():
        for kind, estimate in by_type.items() if metric != "exact_match" else ():
            yield _tag(metric, kind), estimate["value"]


def _tag(metric: str, kind: str) -> str:
    return f"eval/{metric}" if kind == "overall" else f"eval/{metric}/{kind.replace('/', '-')}"
