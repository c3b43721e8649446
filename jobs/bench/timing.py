"""How benchmarks measure: several ways of doing one thing take turns; the result is a median with its range.

In: functions that do the work once. Out: Results, which `jobs/benchmark.py` prints and writes as JSON.
"""

import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil  # type: ignore[import-untyped]

from smolray.launch.background import in_background

SAMPLE_SECONDS = 0.5


@dataclass
class Cost:
    """What one repetition took. CPU-seconds count all processes that worked for it; peak memory is not always taken."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    peak_mb: float | None = None


@dataclass(frozen=True)
class Result:
    """Ours against a peer on the same work.

    `ratio` = peer_s / ours_s: how many times as fast ours is. `limit`: what it would be if both ways had as many
    operations a second. `clock`: what the seconds are of.
    """

    name: str
    measured: str  # what was done, in words
    items: int  # pieces of work in a repetition
    unit: str  # what a piece is
    peer: str
    ours: Sequence[Cost] = field(repr=False)
    theirs: Sequence[Cost] = field(repr=False)
    clock: str = "wall"  # or "cpu": of a machine that others use, or where one side hides work in other processes
    ours_flops: float | None = None  # floating-point operations of all pieces, where they are counted (flops.py)
    peer_flops: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The record of the JSON list; *_range are (min, max) of the repetitions."""
        record = {k: v for k, v in asdict(self).items() if k not in ("ours", "theirs")}
        record["repetitions"] = len(self.ours)
        for side, costs in (("ours", self.ours), ("peer", self.theirs)):
            for key, values in (("wall_s", [c.wall_s for c in costs]), ("cpu_s", [c.cpu_s for c in costs])):
                record[f"{side}_{key}"] = round(statistics.median(values), 4)
                record[f"{side}_{key}_range"] = [round(min(values), 4), round(max(values), 4)]
            record[f"{side}_s"], record[f"{side}_s_range"] = (
                record[f"{side}_{self.clock}_s"],
                record[f"{side}_{self.clock}_s_range"],
            )
            peaks = [c.peak_mb for c in costs if c.peak_mb is not None]
            record[f"{side}_peak_mb"] = round(max(peaks)) if peaks else None
        record["ratio"] = round(record["peer_s"] / record["ours_s"], 3)
        record["limit"] = record["share_of_limit"] = None
        if self.ours_flops and self.peer_flops:
            limit = self.peer_flops / self.ours_flops
            record |= {"limit": round(limit, 2), "share_of_limit": round(record["ratio"] / limit, 3)}
        return record


def in_turns(ways: dict[str, Callable[[], Cost]], repetitions: int) -> dict[str, list[Cost]]:
    """Run each way once to warm up (imports, worker processes, file cache), then all of them in turns.

    Whatever else the machine does then slows all of them alike.
    """
    costs: dict[str, list[Cost]] = {name: [] for name in ways}

    for repetition in range(repetitions + 1):
        for name, way in ways.items():
            cost = way()
            if repetition:
                costs[name].append(cost)
    return costs


@contextmanager
def measured(ray: bool) -> Iterator[Cost]:
    """A Cost of the block, filled in at its end.

    It counts this process and, with `ray`, Ray's processes, otherwise those of `multiprocessing`.
    """
    cost, seen, before = Cost(), {}, _cpu(ray)

    def sample(over: threading.Event) -> None:  # the times of a process are gone when it has ended
        while not over.wait(SAMPLE_SECONDS):
            seen.update(_cpu(ray))

    with in_background(sample):
        began = time.perf_counter()
        yield cost
        cost.wall_s = time.perf_counter() - began
    seen.update(_cpu(ray))
    cost.cpu_s = sum(seconds - before.get(pid, 0.0) for pid, seconds in seen.items())


def _cpu(ray: bool) -> dict[int, float]:
    """Process id -> CPU-seconds so far."""
    me, peers = psutil.Process(), {p.pid for p in multiprocessing.active_children()}
    processes = (
        [p for p in me.children(recursive=True) if p.pid not in peers]
        if ray
        else [psutil.Process(pid) for pid in peers]
    )
    found = {}
    for process in [me, *processes]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        found[process.pid] = times.user + times.system
    return found
