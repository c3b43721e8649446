"""The micro-batches of one worker, in the order of the plan. A Ray Data pipeline reads, decodes and collates them.

In: a shard folder, the plan, and the numbers of the worker's micro-batches. Out: prefetched Batches in that order, the
time waited for them, and Ray Data's own statistics. Tasks run on the worker's node where they can: decoded tiles then
stay there, and only encoded bytes cross the network.
"""

import time
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import pyarrow as pa
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from smolray.config import RunConfig
from smolray.data.batch import Batch
from smolray.data.collate import COLLATE
from smolray.data.encode import cached_encoder, training_encoder
from smolray.data.plan import EpochPlan
from smolray.data.ray_context import at_once, quiet_context
from smolray.data.reader import ALONE, ShardReader, Sidecars
from smolray.data.shards import read_manifest

BATCHES_PER_TASK = 4  # neighbours share row groups, and fewer tasks start


class Stream:
    """An iterable of Batches.

    Attributes:
        wait_seconds: the time that the consumer has waited for data.
        bytes_read: bytes of the rows that were read.
        bytes_needed: bytes of the rows that the batches contain.
        statistics: Ray Data's own, once the last batch is there.
    """

    def __init__(
        self,
        folder: str,
        plan: EpochPlan,
        numbers: Sequence[int],
        config: RunConfig,
        collate: str | None = None,
        consumers: int = 1,
        sidecars: Sidecars = ALONE,
        trained: bool = False,
    ):
        self.sidecars = sidecars
        self.trained = trained  # then the images are augmented, where the run says so
        self.folder, self.plan, self.numbers, self.config = folder, plan, list(numbers), config
        self.collate = collate or config.traits.collate
        self.consumers = consumers  # pipelines that share the cluster

        self.wait_seconds = 0.0
        self.bytes_read = 0
        self.bytes_needed = 0
        self.statistics = ""

    def __iter__(self) -> Iterator[Batch]:
        if not self.numbers:
            return

        dataset = self._dataset()
        rows = iter(
            dataset.iter_batches(
                batch_size=1, batch_format="pyarrow", prefetch_batches=self.config.data.prefetch_batches
            )
        )

        for position, expected in enumerate(self.numbers):
            start = time.perf_counter()
            row = next(rows)
            self.wait_seconds += time.perf_counter() - start

            if (number := row["number"][0].as_py()) != expected:
                raise RuntimeError(
                    f"Ray Data delivered micro-batch {number}, expected {expected}: the pipeline did not preserve order"
                )

            self.bytes_read += row["bytes_read"][0].as_py()
            self.bytes_needed += row["bytes_needed"][0].as_py()

            batch = Batch.from_bytes(_cell(row["batch"]))
            batch.meta["number"] = number
            if position == len(self.numbers) - 1:
                for _ in rows:  # ends the pipeline now: the consumer does not ask again after the last batch
                    raise RuntimeError("Ray Data delivered more micro-batches than the plan has")
                self.statistics = dataset.stats()
            yield batch

    def _dataset(self) -> ray.data.Dataset:
        context = quiet_context()
        context.execution_options.preserve_order = True
        # Ray Data 2.60 divides the free CPUs among its pipelines in whole numbers (`amount // pipelines`). With one CPU
        # for two pipelines each gets 0, and the scheduling loop then spins and slows down the training thread: on two
        # cores a step took 0.35 s instead of 0.12 s. One CPU more in Ray Data's account prevents it; the tasks still
        # wait for real CPUs.
        context.execution_options.exclude_resources = ray.data.ExecutionResources(cpu=-1)

        config, collate = self.config, self.collate
        epoch = self.plan.epoch if self.trained and config.data.augment else None
        settings = (config.model, config.data, config.image)
        files = tuple(f.name for f in read_manifest(self.folder).files)
        folder, sidecars, plan = self.folder, self.sidecars, ray.put(self.plan)

        def run(batch: pa.Table) -> pa.Table:
            encoder = cached_encoder(*settings) if epoch is None else training_encoder(config, epoch)
            reader = _reader(folder, files, sidecars)
            read, needed = reader.bytes_read, reader.bytes_needed
            specs = [ray.get(plan).micro_batch(n) for n in batch["item"].to_pylist()]

            batches = pa.chunked_array(
                [_column(COLLATE[collate](groups, encoder).to_bytes()) for groups in reader.groups(specs)]
            )
            share = [0] * (len(specs) - 1)
            return pa.table(
                {
                    "number": [s.number for s in specs],
                    "batch": batches,
                    "bytes_read": [reader.bytes_read - read, *share],
                    "bytes_needed": [reader.bytes_needed - needed, *share],
                }
            )

        tasks = -(-len(self.numbers) // BATCHES_PER_TASK)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        return ray.data.from_items(self.numbers, override_num_blocks=tasks).map_batches(
            run,
            batch_format="pyarrow",
            batch_size=None,
            num_cpus=config.data.num_cpus_per_task,
            compute=at_once(self.consumers, tasks),
            scheduling_strategy=here,
        )


def _column(data: bytes) -> pa.Array:
    """A column of one row, without a copy: a batch of images is tens of megabytes."""
    return pa.Array.from_buffers(
        pa.large_binary(), 1, [None, pa.py_buffer(np.array([0, len(data)])), pa.py_buffer(data)]
    )


def _cell(column: pa.ChunkedArray) -> pa.Buffer:
    """The only row of a column, as a view of Ray's object store."""
    chunk = next(chunk for chunk in column.chunks if len(chunk))
    _, offsets, data = chunk.buffers()
    start, end = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + 2].tolist()
    return data.slice(start, end - start)


@lru_cache(maxsize=4)
def _reader(folder: str, files: tuple[str, ...], sidecars: Sidecars) -> ShardReader:
    return ShardReader(folder, files, sidecars)
