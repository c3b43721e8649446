"""What the recipe tests run inside gloo workers: training curves, gradients, and save and resume."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import numpy as np
import torch.distributed as dist
from safetensors.torch import save_file

from smolray.config import RunConfig, load_config
from smolray.data.local import LocalStream, local_plan
from smolray.data.plan import EpochPlan
from smolray.precompute.local import local_sidecars
from smolray.run import checkpoint
from smolray.run.checkpoint import Progress
from smolray.train.loop import TrainLoop
from tests.gloo import build_engine


def curve(
    shards: str, overrides: list[str], steps: int, run_dir: str = "", resume: bool = False, separate: bool = False
) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step.

    With `run_dir` the end is saved there; with `resume` the start is read from there.

    `separate`: every conversation is a sequence of its own, in the micro-batches of the packed plan.
    """
    config = load_config(None, [*overrides, f"train.max_steps={steps}"])
    found = checkpoint.latest(run_dir) if resume else None
    engine = build_engine(config, checkpoint.load_state(found) if found else None)
    out: list[tuple[float, float]] = []
    plans = [local_plan(shards, config, epoch) for epoch in range(config.train.num_train_epochs)]
    if separate:
        plans = [unpacked(plan) for plan in plans]
    loop = TrainLoop(
        config,
        engine,
        plans,
        stream_of(shards, config),
        found.progress if found else Progress(),
        [lambda step_info: out.append((step_info.metrics.loss, step_info.metrics.grad_norm))],
    )
    progress = loop.run()
    if run_dir and not resume:
        state = engine.state()
        if dist.get_rank() == 0:
            checkpoint.save(run_dir, state, progress, {}, {"config": asdict(progress)})
        dist.barrier()
    return out


def curves(
    shards: str, jobs: dict[str, tuple[list[str], int] | tuple[list[str], int, bool]]
) -> dict[str, list[tuple[float, float]]]:
    """A curve for each (overrides, steps[, separate]), one after another in the same workers."""
    return {
        name: curve(shards, overrides, steps, separate=bool(separate))
        for name, (overrides, steps, *separate) in jobs.items()
    }


def step_metrics(shards: str, jobs: dict[str, list[str]], steps: int) -> dict[str, list[dict[str, float]]]:
    """Loss, gradient norm and the objective's metrics of each step for each overrides."""
    out: dict[str, list[dict[str, float]]] = {}
    for name, overrides in jobs.items():
        config = load_config(None, [*overrides, f"train.max_steps={steps}"])
        kept = out.setdefault(name, [])
        TrainLoop(
            config,
            build_engine(config),
            [local_plan(shards, config)],
            stream_of(shards, config),
            Progress(),
            [
                lambda step_info, kept=kept: kept.append(
                    {"loss": step_info.metrics.loss, "grad_norm": step_info.metrics.grad_norm}
                    | step_info.metrics.metrics
                )
            ],
        ).run()
    return out


def first_gradients(shards: str, jobs: dict[str, list[str]], folder: str) -> None:
    """The gradient of every parameter on step 1, as `folder/<name>.safetensors`: Adam's first moment after one step is
    (1 - beta1) x gradient.
    """
    for name, overrides in jobs.items():
        config = load_config(None, [*overrides, "train.max_steps=1", "optimizer.max_grad_norm=0"])
        engine = build_engine(config)
        TrainLoop(config, engine, [local_plan(shards, config)], stream_of(shards, config), Progress()).run()
        state = engine.state()
        if dist.get_rank() == 0:
            save_file(
                {k: v / (1 - config.optimizer.adam_beta1) for k, v in state.exp_avg.items()},
                f"{folder}/{name}.safetensors",
            )


def stream_of(shards: str, config: RunConfig) -> Callable[[EpochPlan, Sequence[int]], LocalStream]:
    """How the loop opens its stream.

    Sidecars that the run wants must be there already: every worker would make them.
    """
    sidecars = local_sidecars(shards, config)
    return lambda plan, numbers: LocalStream(shards, plan, numbers, config, sidecars)


def unpacked(plan: EpochPlan) -> EpochPlan:
    """The same micro-batches, their groups cut into single conversations."""
    return replace(
        plan, group_start=np.arange(len(plan.index_rows) + 1), batch_start=plan.group_start[plan.batch_start]
    )
