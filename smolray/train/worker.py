"""One worker of a run, from the newest checkpoint to the record of the run.

In: the config and folders prepared by the launcher, inside an initialised process group. Out: on every rank, the record
that result.json is made of. Every function is collective.
"""

import time
from typing import Any

import torch
import torch.distributed as dist

from smolray.config import RunConfig
from smolray.data.reader import Folders
from smolray.evaluate.validation import evaluate_shards, evaluation_fields
from smolray.model.parts import drop_submodules, frozen_prefix
from smolray.model.trained import trained_model
from smolray.planner.probe import probe_hardware
from smolray.run import checkpoint
from smolray.run.checkpoint import Checkpoint, Progress
from smolray.run.events import read_events, surviving
from smolray.run.lease import require_owner
from smolray.run.predictions import write_predictions
from smolray.run.status import RESIZED, stop_requested
from smolray.train.audit import Audit
from smolray.train.collective import agree, broadcast, gather
from smolray.train.early_stopping import evaluations_of
from smolray.train.hooks import RunHooks, RunLog
from smolray.train.saving import CheckpointWriter
from smolray.train.setup import WorkerSetup
from smolray.train.step import Hook, StepMetrics, peak_memory_bytes
from smolray.train.versions import versions


def run_worker(
    config: RunConfig,
    folders: Folders,
    device: torch.device,
    node: tuple[str, str],
    owner: str = "",
    watch: Hook | None = None,
) -> dict[str, Any]:
    """Train, evaluate and save one run, or what is left of it, on a node of this (address, id).

    It does so as long as the run belongs to `owner`. `watch`: a hook that sees each step first.
    """
    began, log = time.time(), RunLog(config.run_dir)
    attempt, found, earlier = broadcast((log.log.attempt, *newest_state(config, log)) if log.log else None)

    setup = WorkerSetup(config, folders, device, probe_hardware(device, config.model.dtype, node), owner)
    model, state = agree(lambda: setup.load(found))
    progress = found.progress if found else Progress(data=setup.data)
    writer = CheckpointWriter(config, owner)
    loop, engine = setup.build_loop(model, state, progress, log.balanced, stop=writer.failed)
    del state  # three times the weights, which the engine has taken over
    audit = Audit(config.run_dir, attempt, dist.get_rank()) if config.train.audit else None
    progress = loop.progress  # TRL starts again
    hooks = RunHooks(config, folders, device, engine, log, audit, writer, earlier if progress.step else ())
    loop.hooks, loop.enough = [*([watch] if watch else []), *hooks.in_order()], hooks.enough

    log_start(log, setup, loop.total_steps)
    if attempt > 1:  # without a checkpoint, all that an earlier attempt did is discarded
        position = (progress.epoch, progress.consumed)
        log.event("resume", step=progress.step, position=position, checkpoint=found.uri if found else None)
    log.event("inventory", **setup.hardware.to_json())
    log.flush()  # an attempt that could not be counted must not begin

    left = progress.step < loop.total_steps and progress.epoch < len(setup.plans)
    if left and found and progress.step:
        hooks.evaluate_missed(found)
    if left and not hooks.enough():
        try:
            progress = loop.run()
        finally:
            writer.close()  # what was saved before a step that failed becomes whole
    elif folders.validation:
        hooks.evaluate(progress.step)  # resumed after the last step: only the report is missing

    status = why_stopped(config) if hooks.stopped else "finished"
    if status == RESIZED:
        log.event("resize", step=progress.step)
    else:
        log.event("end", status=status, step=progress.step, seconds=round(time.time() - began, 1))
    hooks.flush()
    return {
        "status": status,
        "steps": progress.step,
        "samples": progress.samples,
        "tokens": progress.tokens,
        **evaluation_fields(hooks.report),
        "workers": gather(setup.streams.close()),
    }


def measure_worker(config: RunConfig, folders: Folders, device: torch.device, node: tuple[str, str]) -> dict[str, Any]:
    """Train the first steps of a run and write nothing.

    Returns the seconds of each step, the wait for data among them, and the peak bytes of every worker.
    """
    setup = WorkerSetup(config, folders, device, probe_hardware(device, config.model.dtype, node))
    model, _ = agree(lambda: setup.load(None))
    loop, _ = setup.build_loop(model, None, Progress(data=setup.data))
    steps: list[StepMetrics] = []
    loop.hooks = [lambda step_info: steps.append(step_info.metrics)]
    loop.run()

    peaks = gather(peak_memory_bytes(device))
    return {"seconds": [s.seconds for s in steps], "waits": [s.data_wait_seconds for s in steps], "memory": peaks}


def evaluate_worker(
    config: RunConfig, folders: Folders, device: torch.device, uri: str, owner: str = ""
) -> dict[str, Any]:
    """Decode the validation shards with the checkpoint at `uri`.

    Rank 0 writes the predictions, where the run still belongs to `owner`.
    """
    chosen = checkpoint.verify(uri)
    model = trained_model(config, chosen)
    if folders.validation_sidecars.features:
        drop_submodules(model, frozen_prefix(config))

    report = evaluate_shards(model.to(device), config, folders, device)
    if dist.get_rank() == 0:
        require_owner(config.run_dir, owner)
        write_predictions(config.run_dir, chosen.step, report.predictions)
    return {"step": chosen.step, **evaluation_fields(report)}


def newest_state(config: RunConfig, log: RunLog) -> tuple[Checkpoint | None, list[float]]:
    """The newest whole checkpoint, and the headlines of the evaluations up to it.

    The log says which ones are damaged.
    """
    found = checkpoint.latest(config.run_dir, skipped=lambda why: log.event("skipped", what="checkpoint", why=why))
    if found is None:
        return None, []
    evaluated = evaluations_of(surviving(read_events(config.run_dir)), before=found.step)
    # its own is in its manifest first, then in the log
    return found, [*evaluated, *([found.metrics["accuracy"]] if "accuracy" in found.metrics else [])]


def log_start(log: RunLog, setup: WorkerSetup, total_steps: int) -> None:
    """Add the event that begins an attempt."""
    log.event(
        "start",
        config=setup.config.model_dump(mode="json"),
        versions=versions(),
        workers=dist.get_world_size(),
        total_steps=total_steps,
        device=torch.cuda.get_device_name(setup.device) if setup.device.type == "cuda" else "cpu",
    )


def why_stopped(config: RunConfig) -> str:
    """A person requested the stop, or the launcher that starts more workers."""
    return "stopped" if stop_requested(config.run_dir) else RESIZED
