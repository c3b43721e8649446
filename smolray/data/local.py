"""The micro-batches of a plan read in this process, without Ray: for `torchrun` on a single box, benchmarks and tests.

In: a shard folder, a plan, numbers of micro-batches. Out: the same Batches that data/stream.py delivers.
"""

import time
from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
import torch

from smolray.config import RunConfig
from smolray.data.beside import Sidecar, complete
from smolray.data.collate import COLLATE, Batch
from smolray.data.encode import cached_encoder
from smolray.data.features import FeatureWriter, features_sidecar
from smolray.data.index import index_shard
from smolray.data.logps import LogpsWriter, logps_sidecar
from smolray.data.plan import EpochPlan, PlanLimits, lay_epoch
from smolray.data.reader import ALONE, ShardReader, Sidecars
from smolray.data.shards import read_manifest


class LocalStream:
    """Iterates Batches. `wait_seconds`: time spent on reading, decoding and collating, which nothing else hides here."""

    def __init__(self, folder: str, plan: EpochPlan, numbers: Sequence[int], config: RunConfig, sidecars: Sidecars = ALONE):
        self.reader = ShardReader(folder, tuple(f.name for f in read_manifest(folder).files), sidecars)
        self.plan, self.numbers, self.encoder = plan, numbers, cached_encoder(config.model, config.data, config.image)
        self.collate = COLLATE[config.method]
        self.wait_seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        for number in self.numbers:
            began = time.perf_counter()
            batch = self.collate(self.reader.groups([self.plan.micro_batch(number)])[0], self.encoder)
            batch.meta["number"] = number
            self.wait_seconds += time.perf_counter() - began
            yield batch


def local_sidecars(folder: str, config: RunConfig, device: str = "cpu") -> Sidecars:
    """What the run wants beside its training shards (data/sidecar.py makes the same over a cluster), made here where it is not there."""
    shards = read_manifest(folder)

    def made(sidecar: Sidecar, writer: Callable[[], FeatureWriter | LogpsWriter]) -> str:
        def make(todo: list[int]) -> None:
            one = writer()
            for number in todo:
                one.write(shards.files[number].name)

        return complete(sidecar, shards, make)

    features = logps = ""
    if config.model.vision_features == "precompute":
        beside = features_sidecar(folder, config)
        features = made(beside, lambda: FeatureWriter(beside, config, torch.device(device)))
    if config.method == "dpo" and config.dpo.reference == "precompute":
        kept = logps_sidecar(folder, config)
        logps = made(kept, lambda: LogpsWriter(kept, config, torch.device(device), local_index(folder, config), features))
    return Sidecars(features, logps)


def local_index(folder: str, config: RunConfig) -> pa.Table:
    """The index of a shard folder (data/index.py), made here and not kept."""
    encoder = cached_encoder(config.model, config.data, config.image)
    return pa.concat_tables([index_shard(folder, f.name, i, encoder) for i, f in enumerate(read_manifest(folder).files)])


def local_plan(folder: str, config: RunConfig, epoch: int = 0) -> EpochPlan:
    """The plan of an epoch, as the run's workers lay it."""
    return lay_epoch(local_index(folder, config), PlanLimits.of(config), config.seed, epoch)
