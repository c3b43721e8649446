"""Elastic runs: a run of (min, max) workers grows when a node joins.

In: the run, while its workers train. Out: a resize flag in the run's folder. When the workers see it, they save and
end, and the launcher starts as many as there is room for. Ray Train's own resizing does not save, and it looks for
nodes that joined or left only every 20 s. So the driver looks by itself.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from smolray import storage
from smolray.config import RunConfig
from smolray.launch.background import in_background
from smolray.run.events import EventTail
from smolray.run.folder import RunFolder

NEVER = 1e9  # seconds between Ray Train's own resizes, which do not save
POLL_SECONDS = 2.0
ROOM_POLLS = 3  # polls in a row with room: resources that are free for a moment may already be promised
WORTH_SECONDS = 30.0  # about the time of a restart: a run that ends sooner does not grow


class ElasticMonitor:
    """Watches one elastic run. `each`: the resources of one worker.

    After a restart that added no worker, there is no other until nodes join or leave.
    """

    def __init__(self, config: RunConfig, each: dict[str, float]) -> None:
        self.config, self.each = config, each
        self.flag = RunFolder(config.run_dir).resize_flag
        self.nodes: frozenset[str] = frozenset()
        self.asked_at = 0  # the number of workers when the run was last asked to grow
        self.workers, self.began, self.steps = 0, 0.0, 0  # of the present group
        self.eta = 0.0
        self.room = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A block within which the run's workers train."""
        low, high = self.config.resources.workers
        storage.delete(self.flag)
        if low == high:
            yield
            return

        self.workers, self.room = 0, 0
        _look_again()
        with in_background(self._watch):
            yield

    def _watch(self, over: threading.Event) -> None:
        tail = EventTail(self.config.run_dir, skip=True)
        while not over.wait(POLL_SECONDS if storage.is_local(self.flag) else 2 * POLL_SECONDS):
            try:
                self._look(tail)
            except (OSError, ray.exceptions.RayError):
                continue  # a head or a storage that is away for a moment

    def _look(self, tail: EventTail) -> None:
        if (nodes := _living()) != self.nodes:
            self.nodes, self.asked_at = nodes, 0
            _look_again()

        for event in tail.new():
            if event["event"] == "start":
                self.workers, self.eta, self.began, self.steps = event["workers"], 0.0, event["time"], 0
            elif event["event"] == "step":
                self.steps += 1
                # pauses between epochs included
                self.eta = (event["time"] - self.began) / self.steps * (event["total_steps"] - event["step"])

        # Between two groups of workers all resources are free: only a run that trains is asked to grow.
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
    """Whether one more worker fits on a node that has the labels and is not being drained."""
    state: Any = ray._private.state
    leaving, free = state.state.get_draining_nodes(), state.available_resources_per_node()
    nodes = [
        n for n in ray.nodes() if n["Alive"] and n["NodeID"] not in leaving and labels.items() <= n["Labels"].items()
    ]
    return any(all(free.get(n["NodeID"], {}).get(name, 0.0) >= amount for name, amount in each.items()) for n in nodes)


def _look_again() -> None:
    """Let Ray Train's coordinator look at the cluster now. There is none before the first run has started it."""
    try:
        coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
        ray.get(coordinator.get_reserved_resources.remote("", recompute=True), timeout=10)
    except (ValueError, ray.exceptions.RayError):
        return  # it looks by itself within 20 s
