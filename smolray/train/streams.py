"""The streams of one worker, one for each part of an epoch, and the bytes that they have read.

In: the epoch plans and the shards. Out: micro-batches for the training loop, and counts for result.json.
"""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from smolray.config import RunConfig
from smolray.data.plan import EpochPlan
from smolray.data.reader import Folders
from smolray.data.stream import Stream


class WorkerStreams:
    """Opens the streams; one is open at a time."""

    def __init__(self, config: RunConfig, folders: Folders):
        self.config, self.folders = config, folders
        self._open: Stream | None = None
        self._bytes_read = self._bytes_needed = 0  # of the streams before it

    def open(self, plan: EpochPlan, numbers: Sequence[int], collate: str | None = None) -> Stream:
        """The micro-batches `numbers` of an epoch."""
        self._count_bytes()
        self._open = Stream(
            self.folders.train,
            plan,
            numbers,
            self.config,
            collate,
            consumers=dist.get_world_size(),
            sidecars=self.folders.sidecars,
            trained=True,
        )
        return self._open

    def close(self) -> dict[str, Any]:
        """Ray Data's statistics of the last stream, and the bytes of all of them."""
        statistics = self._open.statistics if self._open else ""
        self._count_bytes()
        self._open = None
        return {"ray_data": statistics, "bytes_read": self._bytes_read, "bytes_needed": self._bytes_needed}

    def _count_bytes(self) -> None:
        if self._open is not None:
            self._bytes_read += self._open.bytes_read
            self._bytes_needed += self._open.bytes_needed
