"""Benchmark of whole LoRA runs of three epochs: vision features computed once, as `model.vision_features=auto` chooses,
against computed in every epoch.

In: easy-vqa's images with some of their questions, and a random model with SmolVLM's vocabulary. Out: a Result for each
number of questions an image, with the cost of a run through Ray from its start to its last step, the features' writing
included. The start takes seconds of either: only of runs that are long enough the limit can be reached.
"""

import contextlib
import io
import shutil
import tempfile
from itertools import count
from pathlib import Path

from jobs.bench.flops import Work
from jobs.bench.timing import Cost, Result, in_turns, measured
from jobs.bench.train import QUESTIONS, dtype, image_rows, longest_edge, on_gpu

CONVERSATIONS, EPOCHS, BATCH = 384, 3, 16


def lora_epochs(model: str, scale: float, repetitions: int) -> list[Result]:
    """A run of three epochs with several questions an image, and one with a single question."""
    return [
        _case("lora_epochs", QUESTIONS, "5.4 questions per image", model, scale, repetitions),
        _case("lora_epochs_single", (1,), "one question per image", model, scale, repetitions),
    ]


def _case(name: str, questions: tuple[int, ...], words: str, model: str, scale: float, repetitions: int) -> Result:
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
