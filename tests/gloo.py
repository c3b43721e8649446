"""Plain gloo workers for engine tests: real processes, real DeepSpeed, no Ray."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from smolray.config import RunConfig
from smolray.data.collate import Batch, collate_training
from smolray.data.encode import cached_encoder
from smolray.data.index import index_shard
from smolray.data.plan import EpochPlan, PlanLimits, lay_epoch
from smolray.data.reader import ShardReader
from smolray.data.shards import read_manifest
from smolray.engine.base import EngineState
from smolray.engine.zero import ZeroEngine
from smolray.model.adapters import prepare_for_training
from smolray.model.load import load_model
from smolray.objectives import objective_of


def run_workers(function: Callable[..., Any], world_size: int, *args: Any) -> Any:
    """Run `function(*args)` on `world_size` gloo workers; returns rank 0's result (JSON types)."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_worker, (world_size, folder, function, args), nprocs=world_size, start_method="spawn")
        return json.loads((Path(folder) / "result.json").read_text())


def _worker(rank: int, world_size: int, folder: str, function: Callable[..., Any], args: Sequence[Any]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world_size)
    result = function(*args)
    if rank == 0:
        (Path(folder) / "result.json").write_text(json.dumps(result))
    dist.destroy_process_group()


class LocalStream:
    """The micro-batches of a plan, read in this process."""

    wait_seconds = 0.0

    def __init__(self, folder: str, plan: EpochPlan, numbers: Sequence[int], config: RunConfig):
        self.reader = ShardReader(folder, tuple(f.name for f in read_manifest(folder).files))
        self.plan, self.numbers, self.encoder = plan, numbers, cached_encoder(config.model, config.data, config.image)

    def __iter__(self) -> Iterator[Batch]:
        for number in self.numbers:
            batch = collate_training(self.reader.groups([self.plan.micro_batch(number)])[0], self.encoder)
            batch.meta["number"] = number
            yield batch


def local_index(folder: str, config: RunConfig) -> pa.Table:
    encoder = cached_encoder(config.model, config.data, config.image)
    return pa.concat_tables([index_shard(folder, f.name, i, encoder) for i, f in enumerate(read_manifest(folder).files)])


def local_plan(folder: str, config: RunConfig, epoch: int = 0) -> EpochPlan:
    return lay_epoch(local_index(folder, config), PlanLimits.of(config), config.seed, epoch)


def build_engine(config: RunConfig, state: EngineState | None = None) -> ZeroEngine:
    torch.manual_seed(0)
    return ZeroEngine(prepare_for_training(load_model(config.model), config), objective_of(config), config, torch.device("cpu"), state)
