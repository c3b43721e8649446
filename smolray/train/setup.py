"""What a worker builds before it trains: plans, model, engine and loop.

In: a config, the prepared folders, and the newest checkpoint if there is one. Out: a loop that is ready to run, and the
engine in it.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import pyarrow.compute as pc
import torch
import torch.distributed as dist
from torch import nn

from smolray import storage
from smolray.config import ConfigError, RunConfig
from smolray.config.devices import no_bf16, no_kernels
from smolray.data.encode import cached_encoder
from smolray.data.index import fingerprint as index_fingerprint
from smolray.data.plan import EpochPlans, PlanError, PlanLimits, epoch_plans
from smolray.data.ray_jobs import load_index
from smolray.data.reader import Folders
from smolray.data.shards import read_manifest
from smolray.engine.base import Engine
from smolray.engine.pipeline.engine import PipelineEngine
from smolray.engine.pipeline.load import load_stage
from smolray.model.adapters import prepare_for_training
from smolray.model.kernels import check_kernels, use_kernels
from smolray.model.load import load_model
from smolray.model.parts import drop_submodules, frozen_prefix
from smolray.objectives.registry import objective_of
from smolray.planner.probe import HardwareProbe
from smolray.run import checkpoint
from smolray.run.checkpoint import Checkpoint, Progress
from smolray.run.folder import RunFolder
from smolray.run.lease import is_owner
from smolray.run.state import EngineState
from smolray.train.balance import MicroBatchBalancer, OnBalanced
from smolray.train.collective import gather
from smolray.train.loop import TrainLoop
from smolray.train.streams import WorkerStreams

if TYPE_CHECKING:
    from smolray.train.trl import TrlRun


@dataclass
class WorkerSetup:
    """Builds what one worker needs; `load` comes first, then `build_loop`."""

    config: RunConfig
    folders: Folders
    device: torch.device
    hardware: HardwareProbe
    owner: str = ""
    plans: EpochPlans = field(init=False)
    data: str = field(init=False)  # fingerprint of shards, index and plan
    streams: WorkerStreams = field(init=False)

    def __post_init__(self) -> None:
        self.streams = WorkerStreams(self.config, self.folders)

    def load(self, found: Checkpoint | None) -> tuple[nn.Module, EngineState | None]:
        """Check the device, build the plans, read the model and the checkpoint.

        Not collective: it may fail on one worker alone.
        """
        check_device(self.config, self.device)
        self.plans = build_plans(self.config, self.folders)
        check_validation(self.config, self.folders)

        self.data = data_fingerprint(self.config, self.folders)
        if found is not None and found.progress.data != self.data:
            raise ConfigError(
                f"run {self.config.name!r} has a checkpoint at step {found.step} with other data, seed, batch, "
                "length or lora.init_lora_weights settings: it means nothing here; choose another name, or restore the "
                "settings"
            )
        return self._load_model(), checkpoint.load_state(found) if found else None

    def build_loop(
        self,
        model: nn.Module,
        state: EngineState | None,
        progress: Progress,
        on_balanced: OnBalanced = lambda speeds, counts: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> "tuple[TrainLoop | TrlRun, Engine | TrlRun]":
        """The training loop without its hooks, and the engine in it. Collective.

        `stop`: a reason to stop beside those of `stop_check`; asked on rank 0.
        """
        asked = stop_check(self.config.run_dir, self.owner)

        def stopping() -> bool:
            return stop() or asked()

        if self.config.engine.name == "trl":
            from smolray.train.trl import TrlRun

            model = model.to(self.device)
            run = TrlRun(self.config, model, state, self.plans, self.folders.train, progress, stop_requested=stopping)
            return run, run

        engine = self._build_engine(model, state)
        loop = TrainLoop(
            self.config,
            engine,
            self.plans,
            partial(self.streams.open, collate=None if engine.sees_images else "imageless"),
            progress,
            stop_requested=stopping,
            balancer=self._balancer(engine, on_balanced),
            total_steps=count_steps(self.plans, self.config),
        )
        return loop, engine

    def _load_model(self) -> nn.Module:
        if self.config.engine.name == "pipeline":
            return use_kernels(load_stage(self.config, self._stage_order()), self.config.model)
        model = prepare_for_training(load_model(self.config.model), self.config)
        if self.folders.sidecars.features:
            drop_submodules(model, frozen_prefix(self.config))
        return use_kernels(model, self.config.model)

    def _build_engine(self, model: nn.Module, state: EngineState | None) -> Engine:
        objective = objective_of(self.config)
        if self.config.engine.name == "pipeline":
            return PipelineEngine(model, objective, self.config, self.device, state, self._stage_order())
        from smolray.engine.zero import ZeroEngine  # DeepSpeed looks for its accelerator when it is imported

        return ZeroEngine(model, objective, self.config, self.device, state)

    def _stage_order(self) -> tuple[int, ...] | None:
        """The ranks in the order of the pipeline's stages; None: the order of their numbers."""
        return self.hardware.ranks(self.config.engine.gpus) if self.config.engine.gpus else None

    def _balancer(self, engine: Engine, on_balanced: OnBalanced) -> MicroBatchBalancer:
        setting, chosen = self.config.train.load_balancing, self.config.engine
        wanted = setting == "speed" or (setting == "auto" and self.hardware.unequal)
        # Stage 3 gathers parameters in every pass: all workers take the same number of micro-batches.
        possible = chosen.name == "zero" and self.config.zero_stage < 3
        return MicroBatchBalancer(*engine.data_parallel, measure=wanted and possible, on_balanced=on_balanced)


def check_device(config: RunConfig, device: torch.device) -> None:
    """Raise ConfigError where this device cannot compute what the run asks for."""
    check_kernels(config.model, device)
    dtype = config.model.dtype
    if config.model.load_in_8bit and config.lora is not None and config.lora.use_dora and device.type != "cuda":
        raise ConfigError(
            "model.load_in_8bit = true with lora.use_dora = true on a CPU: bitsandbytes loses the weights that DoRA "
            "reads after the first pass; nearest: model.load_in_4bit=true, or lora.use_dora=false"
        )
    if dtype == "float16" and device.type != "cuda":
        raise ConfigError(
            "model.dtype = float16 needs a CUDA device, this worker has none; "
            "allowed here: float32, bfloat16; nearest: bfloat16"
        )
    if device.type != "cuda":
        return

    name = torch.cuda.get_device_name(device)
    if missing := no_kernels(name, torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()):
        raise ConfigError(missing)
    if dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(no_bf16(name))


def build_plans(config: RunConfig, folders: Folders) -> EpochPlans:
    """The plans of the epochs, none of which is built yet. Raises PlanError where no conversation is left."""
    return epoch_plans(load_index(folders.train, config), config)


def count_steps(plans: EpochPlans, config: RunConfig) -> int:
    """`train.max_steps`, else the steps of all epochs. Collective.

    The schedule of the learning rate needs them before the first step. Where the number of an epoch's micro-batches
    depends on its order, each worker builds some of the plans to count them, one at a time.
    """
    if config.train.max_steps > 0:
        return config.train.max_steps
    size, epochs = config.global_batch, len(plans)
    if (each := plans.micro_batches) is not None:
        return -(-each // size) * epochs
    own = range(dist.get_rank(), epochs, dist.get_world_size())
    return sum(gather(sum(plans[epoch].steps(size) for epoch in own)))


def check_validation(config: RunConfig, folders: Folders) -> None:
    """Raise PlanError where there are validation data and none of them fits data.max_length."""
    if not folders.validation:
        return
    tokens = load_index(folders.validation, config)["tokens"]
    if not pc.any(pc.greater(tokens, 0)).as_py():
        raise PlanError(
            f"none of the validation conversations fits data.max_length = {config.data.max_length}; "
            "raise it, or lower image.longest_edge"
        )


def data_fingerprint(config: RunConfig, folders: Folders) -> str:
    """Names the order of the samples, in which a checkpoint's position counts, and what its adapters started as."""
    encoder = cached_encoder(config.model, config.data, config.image)
    shards = read_manifest(folders.train).fingerprint
    parts: tuple[object, ...] = (shards, index_fingerprint(encoder), PlanLimits.of(config), config.seed)
    parts += (config.data.repeats,) if config.data.repeats else ()
    init = config.lora.init_lora_weights if config.lora else "default"
    parts += (init,) if init not in ("default", "gaussian") else ()
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def stop_check(run_dir: str, owner: str = "") -> Callable[[], bool]:
    """Looks whether the workers are to save and end.

    A person or the launcher requests it, or the run belongs to another driver than `owner`: then saving is refused.
    """
    folder = RunFolder(run_dir)
    flags: Sequence[str] = (folder.stop_flag, folder.resize_flag)
    return lambda: any(storage.exists(flag) for flag in flags) or not is_owner(run_dir, owner)
