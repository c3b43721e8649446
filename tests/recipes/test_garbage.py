"""Steps leave no tensor to Python's garbage collector: smolray lets it come rarely, and memory would grow meanwhile."""

import gc

import pytest
import torch

from smolray.config import load_config
from smolray.data.local import local_plan
from smolray.run.checkpoint import Progress
from smolray.train.loop import TrainLoop
from tests.gloo import build_engine, run_workers
from tests.recipes.curves import stream_of

SFT = {
    "ZeRO-2": ["engine.stage=2"],
    "ZeRO-3": ["engine.stage=3"],
    "checkpointing": ["model.gradient_checkpointing=true"],
    "QLoRA": ["lora.r=4", "model.train=[]", "model.load_in_4bit=true"],
}
PIPELINE = {"pipeline": ["engine.name=pipeline", "engine.pipeline_stages=2"]}
PREFERENCES = {"DPO": [], "SimPO": ["method=simpo"]}
STEPS, WARM_UP = 5, 3


def tensors_left(shards, jobs, planted=0):
    """How many tensors each job leaves in reference cycles, after the steps of its warm-up.

    `planted`: so many are left there on purpose.
    """
    left = {}
    for name, overrides in jobs.items():
        config = load_config(None, [*overrides, f"train.max_steps={STEPS}"])

        def watch(step_info):
            if step_info.metrics.step == WARM_UP:
                gc.collect()
                gc.disable()
                gc.set_debug(gc.DEBUG_SAVEALL)  # what would be freed is kept in gc.garbage
                leave_in_cycles(planted)

        plans = [local_plan(shards, config)]
        loop = TrainLoop(config, build_engine(config), plans, stream_of(shards, config), Progress(), [watch])
        loop.run()

        gc.collect()
        left[name] = sum(isinstance(found, torch.Tensor) for found in gc.garbage)
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
        del loop  # the engine itself is in cycles
    return left


def leave_in_cycles(tensors):
    for _ in range(tensors):
        cycle = [torch.zeros(1)]
        cycle.append(cycle)


@pytest.mark.parametrize(
    ("kind", "jobs", "workers"), [("recipe", SFT, 1), ("recipe", PIPELINE, 2), ("pairs", PREFERENCES, 1)]
)
def test_no_step_leaves_a_tensor_to_the_garbage_collector(request, kind, jobs, workers):
    shards, overrides = request.getfixturevalue(kind)
    jobs = {name: [*overrides, *more] for name, more in jobs.items()}
    assert run_workers(tensors_left, workers, shards, jobs) == dict.fromkeys(jobs, 0)


def test_a_tensor_that_is_left_would_be_found(recipe):
    shards, overrides = recipe
    assert run_workers(tensors_left, 1, shards, {"planted": overrides}, 2) == {"planted": 2}
