"""Elastic runs beside Ray Train: in goes a run of (min, max) workers, out come a group that has saved before it grows,
and news of boxes at once.

Ray Train resizes without saving, and looks for boxes that came or went every 20 s. Here the driver looks: when one more
worker would fit, the run is asked to save and end its workers, and is started again with as many as there is room for.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from smolray import storage
from smolray.config import RunConfig
from smolray.launch.background import beside
from smolray.run.events import EventTail
from smolray.run.folder import RunFolder

NEVER = 1e9  # seconds between Ray Train's own resizes, which do not save
POLL_SECONDS = 2.0
ROOM_POLLS = 3  # in a row: what is free for a moment is about to be taken by something else
WORTH_SECONDS = 30.0  # a restart takes about as long: a run that ends sooner is left alone


class ElasticMonitor:
    """Watches over one elastic run; `each` is what a worker takes.

    A restart that brought no worker is not tried again until boxes change.
    """

    def __init__(self, config: RunConfig, each: dict[str, float]) -> None:
        self.config, self.each = config, each
        self.flag = RunFolder(config.run_dir).resize_flag
        self.boxes: frozenset[str] = frozenset()
        self.asked_at = 0  # workers when it was last asked to grow
        self.workers, self.began, self.steps = 0, 0.0, 0  # of the group at work
        self.eta = 0.0
        self.room = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it the run's workers train."""
        low, high = self.config.resources.workers
        storage.delete(self.flag)
        if low == high:
            yield
            return
        self.workers, self.room = 0, 0
        _look_again()
        with beside(self._watch):
            yield

    def _watch(self, over: threading.Event) -> None:
        tail = EventTail(self.config.run_dir, skip=True)
        while not over.wait(POLL_SECONDS if storage.is_local(self.flag) else 2 * POLL_SECONDS):
            try:
                self._look(tail)
            except (OSError, ray.exceptions.RayError):
                continue  # a head or a storage that is away for a moment

    def _look(self, tail: EventTail) -> None:
        if (boxes := _living()) != self.boxes:
            self.boxes, self.asked_at = boxes, 0
            _look_again()
        for event in tail.new():
            if event["event"] == "start":
                self.workers, self.eta, self.began, self.steps = event["workers"], 0.0, event["time"], 0
            elif event["event"] == "step":
                self.steps += 1
                # pauses between epochs included
                self.eta = (event["time"] - self.began) / self.steps * (event["total_steps"] - event["step"])
        # Between two groups of workers all is free: only a run that trains is asked.
        wanted = (
            0 < self.workers < self.config.resources.workers[1]
            and self.workers != self.asked_at
            and self.eta > WORTH_SECONDS
        )
        self.room = self.room + 1 if wanted and _has_room(self.each, self.config.resources.label_selector) else 0
        if self.room == ROOM_POLLS:
            self.asked_at = self.workers
            storage.write_bytes(self.flag, b"")


def _living() -> frozenset[str]:
    return frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])


def _has_room(each: dict[str, float], labels: dict[str, str]) -> bool:
    """Whether a box that stays, and has the labels, has free what one more worker takes."""
    state: Any = ray._private.state
    leaving, free = state.state.get_draining_nodes(), state.available_resources_per_node()
    boxes = [
        n for n in ray.nodes() if n["Alive"] and n["NodeID"] not in leaving and labels.items() <= n["Labels"].items()
    ]
    return any(all(free.get(n["NodeID"], {}).get(name, 0.0) >= amount for name, amount in each.items()) for n in boxes)


def _look_again() -> None:
    """Have Ray Train's coordinator look at the cluster now; where there is none yet, the first run starts it."""
    try:
        coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
        ray.get(coordinator.get_reserved_resources.remote("", recompute=True), timeout=10)
    except (ValueError, ray.exceptions.RayError):
        return  # it looks by itself within 20 s
