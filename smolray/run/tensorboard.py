"""The curves of a run for TensorBoard.

In: the surviving events of a run. Out: scalars in a local folder.
"""

from collections.abc import Iterator

from smolray.run.events import Event, read_events, surviving
from smolray.run.progress import accuracy_of
from smolray.run.result import reading
from smolray.run.status import RunNotFoundError

TRAINING = ("loss", "grad_norm", "learning_rate", "epoch")
# field of a step event -> name of its amount per second
RATES = {"samples": "samples_per_second", "tokens": "tokens_per_second", "data_wait_seconds": "data_wait_share"}


def export_tensorboard(run_dir: str, out: str) -> int:
    """Write the surviving history as TensorBoard scalars into the local folder `out`; returns the number of points.

    A second export adds to the folder, so give a new one. Raises RunNotFoundError where the run has no events.
    """
    from tensorboardX import SummaryWriter

    events = surviving(read_events(run_dir))
    if not events:
        raise RunNotFoundError(f"{run_dir} has no events to export yet")

    points = 0
    with reading(run_dir), SummaryWriter(out) as writer:
        for event in events:
            for tag, value in _scalars(event):
                writer.add_scalar(tag, value, global_step=event.get("step", 0), walltime=event["time"])
                points += 1
    return points


def _scalars(event: Event) -> Iterator[tuple[str, float]]:
    """Tag and value of everything in an event that makes a curve."""
    if event["event"] == "step":
        yield from _step_scalars(event)
    elif event["event"] == "evaluate":
        for name, value in accuracy_of(event).items():
            yield f"accuracy/{name.replace('/', '-')}", value


def _step_scalars(event: Event) -> Iterator[tuple[str, float]]:
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
