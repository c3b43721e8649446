"""One worker of a run: builds the engine, restores the newest checkpoint, and runs the loop with its hooks.

In: the config and folders prepared by the launcher, inside an initialised process group. Out: on every rank, the record
of the run.
"""

import hashlib
import platform
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
import torch
import torch.distributed as dist
from torch import nn

from smolray import storage
from smolray.config import ConfigError, RunConfig
from smolray.data.encode import cached_encoder
from smolray.data.index import fingerprint as index_fingerprint
from smolray.data.plan import EpochPlan, PlanError, PlanLimits, build_epoch, check_kind
from smolray.data.ray_jobs import load_index
from smolray.data.reader import Folders
from smolray.data.shards import ShardError, read_manifest
from smolray.data.stream import Stream
from smolray.engine.base import Engine
from smolray.engine.pipeline.engine import PipelineEngine
from smolray.engine.pipeline.load import load_stage
from smolray.evaluate.evaluator import EvalReport
from smolray.evaluate.validation import evaluate_shards, evaluation_fields, headline, validation_loss
from smolray.model.adapters import prepare_for_training
from smolray.model.load import load_model
from smolray.model.parts import drop_submodules, frozen_prefix
from smolray.model.trained import trained_model
from smolray.objectives.registry import objective_of
from smolray.planner.probe import HardwareProbe, HardwareProbeError, probe_hardware
from smolray.run import checkpoint
from smolray.run.checkpoint import Checkpoint, CheckpointError, Progress
from smolray.run.events import Event, EventLog
from smolray.run.folder import RunFolder
from smolray.run.predictions import write_predictions
from smolray.run.rates import ETA_STEPS, seconds_left
from smolray.run.state import EngineState
from smolray.run.status import RESIZED, stop_requested
from smolray.storage import StorageFullError
from smolray.train.audit import Audit
from smolray.train.balance import MicroBatchBalancer
from smolray.train.loop import Hook, StepInfo, StepMetrics, TrainLoop, metrics_fields, peak_memory_bytes

if TYPE_CHECKING:
    from smolray.train.trl import TrlRun


SETUP_ERRORS = (ConfigError, CheckpointError, PlanError, ShardError, HardwareProbeError)


def run_worker(config: RunConfig, folders: Folders, device: torch.device, node: tuple[str, str]) -> dict[str, Any]:
    """Train, evaluate and save one run, or what is left of it, on a node of this (address, id).

    Collective over the process group.
    """
    return Worker(config, folders, device, node).run()


def measure_worker(config: RunConfig, folders: Folders, device: torch.device, node: tuple[str, str]) -> dict[str, Any]:
    """Train the first steps of a run and say how long they took; nothing is written. Collective."""
    return Worker(config, folders, device, node).measure()


def evaluate_worker(config: RunConfig, folders: Folders, device: torch.device, uri: str) -> dict[str, Any]:
    """Decode the validation shards with one checkpoint; rank 0 writes the predictions beside it. Collective."""
    chosen = checkpoint.verify(uri)
    model = trained_model(config, chosen)
    if folders.validation_sidecars.features:
        drop_submodules(model, frozen_prefix(config))
    report = evaluate_shards(model.to(device), config, folders, device)
    if dist.get_rank() == 0:
        write_predictions(config.run_dir, chosen.step, report.predictions)
    return {"step": chosen.step, **evaluation_fields(report)}


def check_device(config: RunConfig, device: torch.device) -> None:
    """Raise ConfigError where this device cannot compute in the run's dtype."""
    if config.model.dtype == "float16" and device.type != "cuda":
        raise ConfigError(
            "model.dtype = float16 needs a CUDA device, this worker has none; allowed here: float32, bfloat16; nearest: bfloat16"
        )
    if (
        config.model.dtype == "bfloat16"
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        name = torch.cuda.get_device_name(device)
        raise ConfigError(
            f"model.dtype = bfloat16: {name} has no bf16 units; allowed there: float16, float32; nearest: float16"
        )


@dataclass
class Worker:
    """One worker of a run."""

    config: RunConfig
    folders: Folders
    device: torch.device
    node: tuple[str, str]
    probe_hardware: HardwareProbe = field(init=False)
    engine: "Engine | TrlRun" = field(init=False)
    log: EventLog | None = field(default=None, init=False)  # rank 0 only
    recent_steps: deque[Event] = field(default_factory=lambda: deque(maxlen=ETA_STEPS + 1), init=False)
    reports: dict[int, EvalReport] = field(default_factory=dict, init=False)
    stream: Stream | None = field(default=None, init=False)  # of the epoch at hand
    bytes_read: int = field(default=0, init=False)  # of the epochs before it
    bytes_needed: int = field(default=0, init=False)

    def run(self) -> dict[str, Any]:
        config, run_dir, began = self.config, self.config.run_dir, time.time()
        self.rank, world = dist.get_rank(), dist.get_world_size()
        self.log = EventLog(run_dir) if self.rank == 0 else None
        attempt, found = self._broadcast((self.log.attempt, self._newest()) if self.log else None)
        self.probe_hardware = probe_hardware(self.device, config.model.dtype, self.node)
        model, state = self._agree(lambda: self._load(found))
        self.audit = Audit(run_dir, attempt, self.rank) if config.train.audit else None
        loop = self._build_loop(model, state, found.progress if found else Progress(data=self.data), self._hooks())
        del state  # three times the weights, which the engine has taken over
        progress = loop.progress
        self._event(
            "start",
            config=config.model_dump(mode="json"),
            versions=versions(),
            workers=world,
            total_steps=loop.total_steps,
            device=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
        )
        if attempt > 1:  # an attempt that died before its first checkpoint is taken back whole
            self._event(
                "resume",
                step=progress.step,
                position=(progress.epoch, progress.consumed),
                checkpoint=found.uri if found else None,
            )
        self._event("inventory", **self.probe_hardware.to_json())
        if self.log:
            self.log.flush()  # an attempt that could not be counted must not begin
        self.stopped = False
        if progress.step < loop.total_steps and progress.epoch < len(self.plans):
            progress = loop.run()
        elif self.folders.validation:
            self._evaluate(progress.step)  # resumed after the last step: only the report is missing
        status = self._why_ended() if self.stopped else "finished"
        if status == RESIZED:
            self._event("resize", step=progress.step)
        else:
            self._event("end", status=status, step=progress.step, seconds=round(time.time() - began, 1))
        if self.audit:
            self.audit.flush()
        if self.log:
            self.log.flush()
        return self._record(status, progress)

    def measure(self) -> dict[str, Any]:
        """Seconds of each step, the wait for data among them, and the peak bytes of every worker."""
        self.rank, self.probe_hardware = (
            dist.get_rank(),
            probe_hardware(self.device, self.config.model.dtype, self.node),
        )
        model, _ = self._agree(lambda: self._load(None))
        steps: list[StepMetrics] = []
        self._build_loop(
            model, None, Progress(data=self.data), [lambda step_info: steps.append(step_info.metrics)]
        ).run()
        peaks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(peaks, peak_memory_bytes(self.device))
        return {"seconds": [s.seconds for s in steps], "waits": [s.data_wait_seconds for s in steps], "memory": peaks}

    # What happens after a step, in this order.

    def _hooks(self) -> list[Hook]:
        return [h for h in (self._log_step, self.audit, self._save_and_evaluate) if h is not None]

    def _log_step(self, step_info: StepInfo) -> None:
        if self.log is None:
            return

        metrics = step_info.metrics
        self.recent_steps.append({"step": metrics.step, "time": time.time(), "seconds": metrics.seconds})
        eta = seconds_left(list(self.recent_steps), metrics.total_steps)
        self.log.write("step", **metrics_fields(metrics), eta_seconds=eta)

    def _save_and_evaluate(self, step_info: StepInfo) -> None:
        config, step = self.config, step_info.progress.step
        every, epochs = config.checkpoint.save_steps, config.evaluate.eval_epochs
        done_epochs = step_info.progress.epoch
        due = step_info.last or (step_info.end_of_epoch and epochs and done_epochs % epochs == 0)
        periodic = every and step % every == 0 and not step_info.metrics.skipped
        saving = step_info.stopping or step_info.last or step_info.end_of_epoch or periodic
        metrics: dict[str, float] = {"loss": step_info.metrics.loss}
        # first: an evaluation may need more memory than there is
        saved = self._save(step_info.progress, metrics) if saving else None
        if due and self.folders.validation and not step_info.stopping:
            metrics["accuracy"] = headline(self._evaluate(step), config)
            if config.evaluate.loss and config.method == "sft":
                with self.engine.gathered():
                    metrics["validation_loss"] = validation_loss(self.engine.model, config, self.folders, self.device)
        if saving:
            self._agree(lambda: self._announce(saved, metrics))
        self.stopped = step_info.stopping and not step_info.last

    def _why_ended(self) -> str:
        """Asked by a person, or by the launcher that starts more workers."""
        return "stopped" if stop_requested(self.config.run_dir) else RESIZED

    def _save(self, progress: Progress, metrics: dict[str, float]) -> Checkpoint | None:
        """The checkpoint on rank 0, None elsewhere. Collective."""
        state = self.engine.state()
        # no worker goes on, and perhaps dies, before the checkpoint is whole
        return self._agree(lambda: self._write(state, progress, metrics))

    def _write(self, state: EngineState, progress: Progress, metrics: dict[str, float]) -> Checkpoint | None:
        saved = None
        if self.log is not None:
            about = {"config": self.config.model_dump(mode="json"), "versions": versions()}
            saved = checkpoint.save(self.config.run_dir, state, progress, metrics, about)
            self.log.flush()
        if self.audit:
            self.audit.flush()
        return saved

    def _announce(self, saved: Checkpoint | None, metrics: dict[str, float]) -> None:
        """Write beside a checkpoint what was measured of it, tell of it, and let older ones go. On rank 0."""
        if saved is None or self.log is None:
            return
        settings, step = self.config.checkpoint, saved.progress.step
        if metrics != saved.metrics:
            saved = checkpoint.annotate(saved, metrics)
        checkpoint.prune(self.config.run_dir, settings.save_total_limit, settings.keep_best, step)
        self._event("checkpoint", step=step, path=saved.uri, **metrics)
        self.log.flush()

    def _evaluate(self, step: int) -> EvalReport:
        with self.engine.gathered():
            report = evaluate_shards(self.engine.model, self.config, self.folders, self.device)
        self.reports[step] = report
        if self.log is not None:
            write_predictions(self.config.run_dir, step, report.predictions)
            self._event(
                "evaluate",
                step=step,
                accuracy=report.accuracy,
                counts=report.counts,
                samples=report.samples,
                left_out=report.left_out,
                metrics=report.metrics,
            )
            for name, why in report.skipped.items():
                self._event("skipped", what=f"metric {name}", why=why)
            self.log.flush()
        return report

    # Building blocks.

    def _load(self, found: Checkpoint | None) -> tuple[nn.Module, EngineState | None]:
        """What one worker does by itself: look at its device, lay the plans, read the model and the checkpoint."""
        check_device(self.config, self.device)
        self.plans = self._build_plans()
        if (
            self.folders.validation
            and not pc.any(pc.greater(load_index(self.folders.validation, self.config)["tokens"], 0)).as_py()
        ):
            raise PlanError(
                f"none of the validation conversations fits data.max_length = {self.config.data.max_length}; raise it, or lower image.longest_edge"
            )
        self.data = self._data_fingerprint()
        if found is not None and found.progress.data != self.data:
            raise ConfigError(
                f"run {self.config.name!r} stands at step {found.step} of other data, seed, batch or length settings: "
                "its position means nothing here; choose another name, or put the settings back"
            )
        return self._load_model(), checkpoint.load_state(found) if found else None

    def _load_model(self) -> nn.Module:
        if self.config.engine.name == "pipeline":
            return load_stage(self.config, self._order())
        model = prepare_for_training(load_model(self.config.model), self.config)
        return drop_submodules(model, frozen_prefix(self.config)) if self.folders.sidecars.features else model

    def _agree(self, work: Callable[[], Any]) -> Any:
        """The result of `work`; where it fails on one worker all raise its error, instead of waiting for the one that
        is gone.
        """
        result, error = None, None
        try:
            result = work()
        except (*SETUP_ERRORS, StorageFullError) as fault:
            error = f"worker {self.rank}: {fault}"
        errors: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        if first := next((e for e in errors if e), None):
            raise ConfigError(first)
        return result

    def _build_engine(self, model: nn.Module, state: EngineState | None) -> Engine:
        if self.config.engine.name == "pipeline":
            return PipelineEngine(model, objective_of(self.config), self.config, self.device, state, self._order())
        from smolray.engine.zero import ZeroEngine  # DeepSpeed looks for its accelerator when it is imported

        return ZeroEngine(model, objective_of(self.config), self.config, self.device, state)

    def _build_loop(
        self, model: nn.Module, state: EngineState | None, progress: Progress, hooks: Sequence[Hook]
    ) -> "TrainLoop | TrlRun":
        config, run_folder = self.config, RunFolder(self.config.run_dir)

        def stop() -> bool:
            return storage.exists(run_folder.stop_flag) or storage.exists(run_folder.resize_flag)

        if config.engine.name == "trl":
            from smolray.train.trl import TrlRun

            self.engine = run = TrlRun(
                config, model.to(self.device), state, self.plans, self.folders.train, progress, hooks, stop
            )
            return run
        self.engine = engine = self._build_engine(model, state)
        open_stream = partial(self._open_stream, collate=None if engine.sees_images else "imageless")
        return TrainLoop(
            config,
            engine,
            self.plans,
            open_stream,
            progress,
            hooks,
            stop_requested=stop,
            balancer=self._balancer(engine),
        )

    def _order(self) -> tuple[int, ...] | None:
        """The ranks in the order of the pipeline's stages; None: as they are."""
        return self.probe_hardware.ranks(self.config.engine.gpus) if self.config.engine.gpus else None

    def _balancer(self, engine: Engine) -> MicroBatchBalancer:
        load_balancing, chosen = self.config.train.load_balancing, self.config.engine
        asked = load_balancing == "speed" or (load_balancing == "auto" and self.probe_hardware.unequal)

        def heard(speeds: Sequence[float], shares: Sequence[int]) -> None:
            self._event("balance", tokens_per_second=[round(s, 1) for s in speeds], shares=list(shares))

        return MicroBatchBalancer(
            *engine.data_parallel, measure=asked and chosen.name == "zero" and chosen.stage < 3, heard=heard
        )

    def _build_plans(self) -> list[EpochPlan]:
        index, limits = load_index(self.folders.train, self.config), PlanLimits.of(self.config)
        check_kind(index, self.config.method)
        return [
            build_epoch(index, limits, self.config.seed, epoch) for epoch in range(self.config.train.num_train_epochs)
        ]

    def _open_stream(self, plan: EpochPlan, numbers: Sequence[int], collate: str | None) -> Stream:
        self._count_bytes()
        self.stream = Stream(
            self.folders.train,
            plan,
            numbers,
            self.config,
            collate,
            consumers=dist.get_world_size(),
            sidecars=self.folders.sidecars,
        )
        return self.stream

    def _count_bytes(self) -> None:
        if self.stream is not None:
            self.bytes_read += self.stream.bytes_read
            self.bytes_needed += self.stream.bytes_needed

    def _data_fingerprint(self) -> str:
        config = self.config
        encoder = cached_encoder(config.model, config.data, config.image)
        parts = (
            read_manifest(self.folders.train).fingerprint,
            index_fingerprint(encoder),
            PlanLimits.of(config),
            config.seed,
        )
        return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()

    def _newest(self) -> Checkpoint | None:
        return checkpoint.latest(
            self.config.run_dir, skipped=lambda why: self._event("skipped", what="checkpoint", why=why)
        )

    def _event(self, event: str, **fields: Any) -> None:
        if self.log is not None:
            self.log.write(event, **fields)

    def _broadcast(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def _record(self, status: str, progress: Progress) -> dict[str, Any]:
        report = self.reports[max(self.reports)] if self.reports else EvalReport()
        self._count_bytes()
        statistics = self.stream.statistics if self.stream else ""
        mine = {"ray_data": statistics, "bytes_read": self.bytes_read, "bytes_needed": self.bytes_needed}
        workers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(workers, mine)
        return {
            "status": status,
            "steps": progress.step,
            "samples": progress.samples,
            "tokens": progress.tokens,
            **evaluation_fields(report),
            "workers": workers,
        }


def versions() -> dict[str, str]:
    """What the run was made with."""
    from importlib.metadata import version

    names = (
        "smolray",
        "ray",
        "torch",
        "transformers",
        "peft",
        "trl",
        "deepspeed",
        "bitsandbytes",
        "pyarrow",
        "datasets",
    )
    return {"python": platform.python_version()} | {name: version(name) for name in names}
