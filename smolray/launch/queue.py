"""A run takes its turn: its driver waits until it is the first in line and the cluster has room for its workers.

In: a run with `resources.queue`. Out: a block that begins when it is its turn. Its data are prepared before that.
"""

import getpass
import time
from collections.abc import Iterator
from contextlib import contextmanager

from smolray import storage
from smolray.config import RunConfig
from smolray.data.ray_context import cluster_capacity
from smolray.launch.resources import use_gpu, worker_resources
from smolray.launch.session import ClusterLostError
from smolray.launch.waiting import waits_for
from smolray.run import queue
from smolray.run.events import EventLog
from smolray.run.lease import LeaseLostError

POLL_SECONDS, BUCKET_POLL_SECONDS = 3.0, 15.0


@contextmanager
def queued(config: RunConfig) -> Iterator[None]:
    """A block that begins when it is the run's turn. The run leaves the queue at its end.

    It stays where its Ray is lost: submitted again it has its old place. Where another driver has taken it over, the
    entry is that one's.
    """
    if not config.resources.queue:
        yield
        return

    try:
        wait_for_turn(config)
        yield
    except (ClusterLostError, LeaseLostError):
        raise
    except BaseException:
        queue.leave(config.storage, config.name)
        raise
    queue.leave(config.storage, config.name)


def wait_for_turn(config: RunConfig) -> None:
    """Stand in line. The run's log says which place it has, and what it waits for."""
    root, workers = config.storage, config.resources.workers[0]
    user = config.resources.user or getpass.getuser()
    entry = queue.enter(root, config.name, user, config.resources.priority, workers)

    told, log, line = "", EventLog(config.run_dir), queue.Line(root, config.name)
    while (what := _obstacle(config, line, workers)) is not None:
        if what != told:
            log.write("waiting", what=what)
            told = what
        time.sleep(POLL_SECONDS if storage.is_local(root) else BUCKET_POLL_SECONDS)
    queue.start(root, entry)


def _obstacle(config: RunConfig, line: queue.Line, workers: int) -> str | None:
    """Why it is not the run's turn yet; None where it is."""
    place, length, starting = line.place()
    told = f"place {place} of {length} in the queue"
    if starting:
        return f"{told}; {starting} is starting"
    short = waits_for(workers, worker_resources(config, use_gpu(config, cluster_capacity())))
    if short:
        return f"{told}; {short}"
    return told if place > 1 else None
