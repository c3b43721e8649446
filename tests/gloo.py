"""Plain gloo workers for engine tests: real processes, real DeepSpeed, no Ray."""

import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from smolray.config import RunConfig
from smolray.engine.base import Engine
from smolray.engine.pipeline.engine import PipelineEngine
from smolray.engine.pipeline.load import load_stage
from smolray.engine.zero import ZeroEngine
from smolray.model.adapters import prepare_for_training
from smolray.model.kernels import use_kernels
from smolray.model.load import load_model
from smolray.model.parts import drop_submodules, frozen_prefix
from smolray.objectives.registry import objective_of
from smolray.run.state import EngineState

# What the workers would each load: this module with torch and DeepSpeed, what DeepSpeed loads for ZeRO, and adapters.
PRELOADED = [
    "tests.gloo",
    "transformers.optimization",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "peft",
    "bitsandbytes",
]


def run_workers(function: Callable[..., Any], world_size: int, *args: Any) -> Any:
    """Run `function(*args)` on `world_size` gloo workers; returns rank 0's result (JSON types)."""
    # one process imports what is heavy; the workers are forked from it
    multiprocessing.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_worker, (world_size, folder, function, args), nprocs=world_size, start_method="forkserver")
        return json.loads((Path(folder) / "result.json").read_text())


def _worker(rank: int, world_size: int, folder: str, function: Callable[..., Any], args: Sequence[Any]) -> None:
    # as from Ray Train
    places = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
    }
    os.environ |= {"DS_ACCELERATOR": "cpu"} | {name: str(value) for name, value in places.items()}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world_size)
    result = function(*args)
    if rank == 0:
        (Path(folder) / "result.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def build_engine(config: RunConfig, state: EngineState | None = None) -> Engine:
    torch.manual_seed(0)
    if config.engine.name == "pipeline":
        # in these tests a GPU is called by its rank
        order = tuple(map(int, config.engine.gpus)) if config.engine.gpus else None
        stage = use_kernels(load_stage(config, order), config.model)
        return PipelineEngine(stage, objective_of(config), config, torch.device("cpu"), state, order)
    model = prepare_for_training(load_model(config.model), config)
    if config.model.vision_features == "precompute":
        drop_submodules(model, frozen_prefix(config))
    use_kernels(model, config.model)
    return ZeroEngine(model, objective_of(config), config, torch.device("cpu"), state)
