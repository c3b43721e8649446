"""A gradient that is nan or infinite never reaches the weights: on every engine and stage, on one worker and on two."""

import math
from functools import cache

import pytest
import torch
import torch.distributed as dist

from smolray.config import load_config
from smolray.data.local import local_plan, local_plans
from smolray.model.adapters import prepare_for_training
from smolray.model.load import load_model
from smolray.run import checkpoint
from smolray.run.checkpoint import Progress
from smolray.train.loop import TrainLoop
from smolray.train.refusal import NonFiniteStepError
from tests.gloo import build_engine, run_workers
from tests.recipes.curves import stream_of

STEPS, BAD = 4, 3
ENGINES = {
    **{f"stage {stage}": [f"engine.stage={stage}"] for stage in range(4)},
    "stage 0 unclipped": ["engine.stage=0", "optimizer.max_grad_norm=0"],
    "stage 0 bf16": ["engine.stage=0", "model.dtype=bfloat16"],
    "stage 2 bf16": ["engine.stage=2", "model.dtype=bfloat16"],
    "stage 3 bf16": ["engine.stage=3", "model.dtype=bfloat16"],
    "stage 2 unclipped": ["engine.stage=2", "optimizer.max_grad_norm=0"],
    "stage 0 lora": ["engine.stage=0", "lora={r: 4}", "model.train=[]"],
}
# Kin of the others, which hold the promise in `make test`.
SLOW = {1: ("stage 0 bf16", "stage 3 bf16", "stage 2 unclipped"), 2: tuple(e for e in ENGINES if len(e) > 7)}
PIPELINES = {"pipeline": ["engine=pipeline"]}
ON_TWO = {name: engine for name, engine in ENGINES.items() if "bf16" not in name} | PIPELINES
TRL = {f"trl stage {stage}": ["engine=trl", f"engine.stage={stage}"] for stage in (0, 2)}
ALIKE = ["data.max_questions_per_image=1", "train.global_batch=2", "image.upscale=true"]  # what TRL can do


def spoil(model, value):
    """At step BAD `value` stands in one place of one worker's gradient; the loss stays finite."""
    parameter = next(p for name, p in model.named_parameters() if p.requires_grad and "text_model.layers" in name)

    def hook(gradient):
        if spoil.step == BAD and dist.get_rank() == dist.get_world_size() - 1:
            gradient = gradient.clone()
            gradient.view(-1)[0] = value
        return gradient

    parameter.register_hook(hook)


def refused(shards, jobs, folder):
    """Of each (overrides, value): the message, the steps that were seen, and whether the weights are those of the
    step before.
    """
    return {
        name: refused_run(shards, overrides, value, f"{folder}/{name}") for name, (overrides, value) in jobs.items()
    }


def refused_run(shards, overrides, value, storage):
    config = load_config(None, [*overrides, f"train.max_steps={STEPS}", f"storage={storage}", "name=spoilt"])
    engine, seen, weights = build_engine(config), [], []
    spoil.step = 1
    spoil(engine.model, float(value))

    def note(step_info):
        seen.append(step_info.metrics.step)
        spoil.step = step_info.metrics.step + 1
        weights[:] = [engine.state().weights]
        state = engine.state()
        if dist.get_rank() == 0:
            checkpoint.save(config.run_dir, state, step_info.progress, {}, {})

    message = ""
    try:
        loop = TrainLoop(config, engine, [local_plan(shards, config)], stream_of(shards, config), Progress(), [note])
        loop.run()
    except NonFiniteStepError as error:
        message = str(error)
    now = engine.state().weights
    same = all(torch.equal(now[name], weight) for name, weight in weights[0].items())
    return {"message": message, "seen": seen, "same": same, "progress": loop.progress.step}


def refused_by_trl(shards, jobs, folder):
    from smolray.train.trl import TrlRun

    out = {}
    for name, (overrides, value) in jobs.items():
        config = load_config(None, [*overrides, *ALIKE, f"train.max_steps={STEPS}", f"storage={folder}/{name}"])
        torch.manual_seed(0)
        model = prepare_for_training(load_model(config.model), config)
        seen, weights = [], []
        spoil.step = 1

        def note(step_info, seen=seen, weights=weights):
            seen.append(step_info.metrics.step)
            spoil.step = step_info.metrics.step + 1
            weights[:] = [run.state().weights]

        run = TrlRun(config, model, None, local_plans(shards, config), shards, Progress(), [note])
        spoil(run.model, float(value))
        message = ""
        try:
            run.run()
        except NonFiniteStepError as error:
            message = str(error)
        now = run.state().weights
        same = all(torch.equal(now[key], weight) for key, weight in weights[0].items())
        out[name] = {"message": message, "seen": seen, "same": same, "progress": run.progress.step}
    return out


def jobs(engines, overrides, value):
    return {name: ([*overrides, *engine], str(value)) for name, engine in engines.items()}


def on(workers, engines):
    """The engines as parameters of a test on so many workers."""
    return [pytest.param(name, marks=pytest.mark.slow if name in SLOW[workers] else ()) for name in engines]


def together(workers, engines, value, recipe, folder):
    """found(engine), of the quick ones or of the slow in one start of the workers."""
    shards, overrides = recipe

    @cache
    def found(slow):
        chosen = {name: engine for name, engine in engines.items() if (name in SLOW[workers]) == slow}
        return run_workers(refused, workers, shards, jobs(chosen, overrides, value), str(folder))

    return lambda name: found(name in SLOW[workers])[name]


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory):
    return together(1, ENGINES, math.nan, recipe, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def two(recipe, tmp_path_factory):
    return together(2, ON_TWO, math.inf, recipe, tmp_path_factory.mktemp("two"))


def assert_refused(found):
    assert "the gradient norm is" in found["message"] and f"at step {BAD} (epoch 0" in found["message"]
    assert found["seen"] == list(range(1, BAD)) and found["progress"] == BAD - 1
    assert found["same"], "the weights are those of the step before"


@pytest.mark.parametrize("engine", on(1, ENGINES))
def test_a_nan_in_one_gradient_ends_the_run_before_the_weights_are_touched(alone, engine):
    assert_refused(alone(engine))


def test_the_message_names_the_samples_and_the_newest_good_checkpoint(alone):
    message = alone("stage 0")["message"]
    assert "; samples " in message and "spoilt/checkpoints/step-00000002: `smolray resume spoilt`" in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("engine", on(2, ON_TWO))
def test_an_infinite_gradient_of_one_worker_ends_the_run_on_all(two, engine):
    assert_refused(two(engine))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_engine_trl_refuses_the_step_as_well(recipe, tmp_path, workers):
    shards, overrides = recipe
    found = run_workers(refused_by_trl, workers, shards, jobs(TRL, overrides, math.nan), str(tmp_path))
    for one in found.values():
        assert_refused(one | {"message": one["message"].replace("epoch 0.", "epoch 0")})
