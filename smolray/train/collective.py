"""What the workers of a run decide together. Every function here is collective: all workers call it.

In: a value, or work that may fail on one worker. Out: the same answer on all of them.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from smolray.config import ConfigError
from smolray.data.plan import PlanError
from smolray.data.shards import ShardError
from smolray.planner.probe import HardwareProbeError
from smolray.run.checkpoint import CheckpointError
from smolray.run.lease import LeaseLostError
from smolray.storage import StorageFullError

T = TypeVar("T")

# Faults of settings, data or folders: starting the workers again cannot mend them.
SETUP_ERRORS = (ConfigError, CheckpointError, PlanError, ShardError, HardwareProbeError, LeaseLostError)


def broadcast(value: Any) -> Any:
    """The value of rank 0."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def gather(value: Any) -> list[Any]:
    """The values of all workers, by rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def agree(work: Callable[[], T]) -> T:
    """Do `work` on every worker and return its result.

    Raises ConfigError on all workers where it fails on one, so that none of them waits for one that is gone.
    """
    try:
        result, error = work(), None
    except (*SETUP_ERRORS, StorageFullError) as fault:
        result, error = None, f"worker {dist.get_rank()}: {fault}"

    if first := next((e for e in gather(error) if e), None):
        raise ConfigError(first)
    return result  # type: ignore[return-value]  # None only with an error
