"""Benchmark of three epochs of LoRA: vision features computed once, as `model.vision_features=auto` chooses, against
computed in every epoch.

In: easy-vqa's images with some of their questions, and a random model with SmolVLM's vocabulary. Out: a Result for each
number of questions an image, the features' writing included: of a run through Ray from its start to its last step, and
of its steps alone. The start takes seconds of either: only of runs that are long enough the limit can be reached.
"""

import contextlib
import io
import shutil
import tempfile
from itertools import count
from pathlib import Path

from jobs.bench.flops import Work
from jobs.bench.peers import Turn, training_device
from jobs.bench.timing import Cost, Result, in_turns, measured
from jobs.bench.train import (
    QUESTIONS,
    STEPS,
    Case,
    dtype,
    image_rows,
    longest_edge,
    make_task,
    on_gpu,
    take_turns,
    with_settings,
)

CONVERSATIONS, EPOCHS, BATCH = 384, 3, 16
NUMBERS = {"": (QUESTIONS, "5.4 questions per image"), "_single": ((1,), "one question per image")}


def lora_epochs(model: str, scale: float, repetitions: int) -> list[Result]:
    """A run of three epochs with several questions an image, and one with a single question."""
    return [_run(f"lora_epochs{name}", *each, model, scale, repetitions) for name, each in NUMBERS.items()]


def lora_steps(model: str, scale: float, repetitions: int) -> list[Result]:
    """The steps of such runs alone."""
    return [_steps(f"lora_steps{name}", *each, model, scale, repetitions) for name, each in NUMBERS.items()]


def _steps(name: str, questions: tuple[int, ...], words: str, model: str, scale: float, repetitions: int) -> Result:
    from smolray.config import load_config
    from smolray.precompute.local import local_sidecars

    batch, steps = max(2, int(BATCH * scale)), 3 + STEPS * (repetitions + 1)
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        case = Case("", questions, ("model.train=[]", "lora={r: 8}"))
        task = make_task(Path(folder), case, model, batch, steps)
        read, every = (with_settings(task, (f"model.vision_features={how}",)) for how in ("precompute", "compute"))
        with measured(ray=False) as written:
            local_sidecars(task.shards, load_config(None, list(read.overrides)), str(training_device()))
        turns = take_turns({"read": ("ours", read), "every": ("ours", every)}, repetitions)
        work = Work.of(task.shards, every.overrides, batch)

    share = 1 / (steps + 2)  # of the data, in a step
    once = [
        Cost(written.wall_s * share + EPOCHS * each.wall_s, written.cpu_s * share + EPOCHS * each.cpu_s)
        for each in _each_step(turns["read"], batch)
    ]
    theirs = [Cost(EPOCHS * each.wall_s, EPOCHS * each.cpu_s) for each in _each_step(turns["every"], batch)]
    flops, clock = EPOCHS * batch * work.training, "wall" if on_gpu() else "cpu"
    what, peer = f"{EPOCHS} epochs of LoRA, a step of each, {words}, {model}", "model.vision_features=compute"
    return Result(name, what, batch, "conversation", peer, once, theirs, clock, flops / work.once(EPOCHS), flops)


def _each_step(turns: list[Turn], batch: int) -> list[Cost]:
    """The cost of a step in each turn."""
    return [Cost(turn.wall_s / turn.items * batch, turn.cpu_s / turn.items * batch) for turn in turns]


def _run(name: str, questions: tuple[int, ...], words: str, model: str, scale: float, repetitions: int) -> Result:
    from smolray.data.shards import write_shards
    from smolray.model.tiny import build_model

    conversations, numbers = max(16, int(CONVERSATIONS * scale)), count()
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        rows = list(image_rows(conversations, questions, pairs=False))
        shards = write_shards(f"{folder}/shards", rows, source="benchmark")
        build_model(model, [m.text for row in rows for c in row.conversations for m in c.messages], f"{folder}/model")
        edge = longest_edge(model)

        def run(features: str) -> Cost:
            return _trained(folder, shards, f"run-{next(numbers)}", _settings(folder, edge, features))

        costs = in_turns({"once": lambda: run("auto"), "every": lambda: run("compute")}, repetitions)
        work = Work.of(shards, _settings(folder, edge, "compute"), BATCH)
        every = EPOCHS * conversations * work.training
        flops = every / work.once(EPOCHS), every
    what = f"LoRA run of {EPOCHS} epochs from start to end, {words}, {model}"
    peer = "model.vision_features=compute"
    items, clock = EPOCHS * conversations, "wall" if on_gpu() else "cpu"
    return Result(name, what, items, "conversation", peer, costs["once"], costs["every"], clock, *flops)


def _settings(folder: str, edge: int, features: str) -> list[str]:
    return [
        f"model.path={folder}/model",
        f"model.dtype={dtype()}",
        "model.train=[]",
        f"model.vision_features={features}",
        "lora={r: 8}",
        "image.upscale=true",
        f"image.longest_edge={edge}",
        f"train.num_train_epochs={EPOCHS}",
        f"train.per_device_train_batch_size={BATCH}",
    ]


def _trained(folder: str, shards: str, name: str, settings: list[str]) -> Cost:
    """The cost of one run on shards of its own: features that stand already would be read."""
    from smolray.config import load_config
    from smolray.launch.driver import launch_run

    own = shutil.copytree(shards, Path(folder) / f"{name}-shards")
    config = load_config(
        None,
        [
            *settings,
            f"name={name}",
            f"storage={folder}/runs",
            f"data.train={own}",
            "checkpoint.save_steps=0",
            "resources.num_workers=1",
            "resources.cpus_per_worker=0.5",
        ],
    )
    with measured(ray=True) as cost, contextlib.redirect_stdout(io.StringIO()):
        launch_run(config)
    return cost
