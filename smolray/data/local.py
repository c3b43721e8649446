"""The micro-batches of a plan read in this process, without Ray: for `torchrun` on a single node, benchmarks and tests.

In: a shard folder, a plan, numbers of micro-batches. Out: the same Batches that data/stream.py delivers.
"""

import time
from collections.abc import Iterator, Sequence
from functools import lru_cache

import pyarrow as pa

from smolray.config import RunConfig
from smolray.data.batch import Batch
from smolray.data.collate import COLLATE
from smolray.data.encode import Encoder, cached_encoder, training_encoder
from smolray.data.index import index_shard
from smolray.data.max_length import chosen_length
from smolray.data.plan import EpochPlan, EpochPlans, epoch_plans
from smolray.data.reader import ALONE, ShardReader, Sidecars
from smolray.data.shards import ShardFile, read_manifest


class LocalStream:
    """Iterates Batches.

    `wait_seconds`: time spent on reading, decoding and collating, which nothing else hides here.
    """

    def __init__(
        self, folder: str, plan: EpochPlan, numbers: Sequence[int], config: RunConfig, sidecars: Sidecars = ALONE
    ):
        self.reader = ShardReader.open(folder, sidecars)
        self.plan, self.numbers, self.encoder = plan, numbers, training_encoder(config, plan.epoch)
        self.collate = COLLATE[config.traits.collate]
        self.wait_seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        for number in self.numbers:
            began = time.perf_counter()
            batch = self.collate(self.reader.groups([self.plan.micro_batch(number)])[0], self.encoder)
            batch.meta["number"] = number
            self.wait_seconds += time.perf_counter() - began
            yield batch


def local_index(folder: str, config: RunConfig) -> pa.Table:
    """The index of a shard folder (data/index.py), made here; kept in no file, and in memory for the next plan."""
    encoder = cached_encoder(config.model, config.data, config.image)
    return _index(folder, read_manifest(folder).files, encoder)


@lru_cache(maxsize=4)
def _index(folder: str, files: tuple[ShardFile, ...], encoder: Encoder) -> pa.Table:
    return pa.concat_tables([index_shard(folder, f.name, i, encoder) for i, f in enumerate(files)])


def local_plan(folder: str, config: RunConfig, epoch: int = 0) -> EpochPlan:
    """The plan of an epoch, as the run's workers build it."""
    return local_plans(folder, config.replace({"train.max_steps": -1, "train.num_train_epochs": epoch + 1}))[epoch]


def local_plans(folder: str, config: RunConfig) -> EpochPlans:
    """The plans of all epochs of a run."""
    index = local_index(folder, config)
    most = cached_encoder(config.model, config.data, config.image).max_length
    return epoch_plans(index, config.replace({"data.max_length": chosen_length([index], config, most)}))
