"""Losses of a few steps of a tiny model, on any device, without Ray.

In: settings of a run. Out: the loss of each step. The images are drawn here: coloured discs and boxes. `python -m
jobs.gpu.curves FOLDER NAME=SETTINGS...` writes the losses on a CPU, which the checks compare with.
"""

import io
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw

from smolray.config import RunConfig, load_config
from smolray.data.sample import Conversation, Message, Part, ShardRow, image_key
from smolray.data.shards import write_shards
from smolray.engine.base import Engine
from smolray.engine.pipeline.engine import PipelineEngine
from smolray.engine.pipeline.load import load_stage
from smolray.model.adapters import prepare_for_training
from smolray.model.load import load_model
from smolray.model.tiny import build_model
from smolray.objectives.registry import objective_of
from smolray.run.checkpoint import Progress
from smolray.run.state import EngineState
from smolray.train.step import StepInfo

STEPS = 6
COLOURS = ("red", "green", "blue", "black", "gray", "teal", "brown", "yellow")
BASE = (
    "train.per_device_train_batch_size=4",
    "train.global_batch=2",
    "optimizer.learning_rate=1e-3",
    "optimizer.lr_scheduler_type=constant",
)


def rows(count: int) -> list[ShardRow]:
    """Images of one shape with two questions each; every conversation also has a wrong answer, for DPO."""
    rng, made = random.Random(0), []
    for number in range(count):
        colour, shape = rng.choice(COLOURS), rng.choice(("circle", "box"))
        picture = Image.new("RGB", (64, 64), "white")
        draw = ImageDraw.Draw(picture)
        (draw.ellipse if shape == "circle" else draw.rectangle)((12, 12, 52, 52), fill=colour)
        data = io.BytesIO()
        picture.save(data, "PNG")
        asked = {"what colour is it?": (colour, "white"), "what shape is it?": (shape, "star")}
        conversations = tuple(
            Conversation(
                f"{number}-{question}",
                (Message("user", (Part("image"), Part("text", question))),),
                chosen=(Message("assistant", (Part("text", right),)),),
                rejected=(Message("assistant", (Part("text", wrong),)),),
                answers=(right,),
            )
            for question, (right, wrong) in asked.items()
        )
        made.append(ShardRow(image_key((data.getvalue(),), conversations[0]), (data.getvalue(),), conversations))
    return made


def answered(row: ShardRow) -> ShardRow:
    """The row for supervised training: the right answer is the last turn."""
    turns = (Conversation(c.id, (*c.messages, *c.chosen), answers=c.answers) for c in row.conversations)
    return ShardRow(row.key, row.images, tuple(turns))


def make_data(folder: Path) -> None:
    """`folder`/model, `folder`/shards and `folder`/pairs."""
    pairs = rows(64)
    write_shards(str(folder / "pairs"), pairs)
    write_shards(str(folder / "shards"), [answered(row) for row in pairs])
    build_model(
        "tiny", ["what colour is it? " + " ".join(COLOURS), "what shape is it? circle box star"], folder / "model"
    )


def config_of(folder: Path, settings: Sequence[str]) -> RunConfig:
    """The run on the data of `make_data`."""
    return load_config(None, [f"model.path={folder / 'model'}", *BASE, *settings])


def engine_of(config: RunConfig, device: torch.device, state: EngineState | None = None) -> Engine:
    """The engine of a run inside a process group."""
    torch.manual_seed(0)
    if config.engine.name == "pipeline":
        return PipelineEngine(load_stage(config), objective_of(config), config, device, state)
    from smolray.engine.zero import ZeroEngine

    model = prepare_for_training(load_model(config.model), config)
    return ZeroEngine(model, objective_of(config), config, device, state)


def losses(
    folder: Path, settings: Sequence[str], device: torch.device, steps: int = STEPS, resumed_after: int = 0
) -> list[float]:
    """The loss of each step; with `resumed_after` the engine is made anew from its state after so many."""
    config = config_of(folder, [*settings, f"train.max_steps={resumed_after or steps}"])
    found: list[float] = []

    def train(config: RunConfig, engine: Engine, progress: Progress) -> Progress:
        from smolray.data.local import LocalStream, local_plans
        from smolray.train.loop import TrainLoop

        shards = str(folder / ("pairs" if config.traits.pairs else "shards"))

        def keep(step_info: StepInfo) -> None:
            found.append(step_info.metrics.loss)

        loop = TrainLoop(
            config,
            engine,
            local_plans(shards, config),
            lambda plan, numbers: LocalStream(shards, plan, numbers, config),
            progress,
            [keep],
        )
        return loop.run()

    engine = engine_of(config, device)
    progress = train(config, engine, Progress())
    if resumed_after:
        config = config.replace({"train.max_steps": steps})
        train(config, engine_of(config, device, engine.state()), progress)
    return found


def process_group(device: torch.device, rank: int = 0, world: int = 1, init: str = "") -> None:
    """The group of the workers, NCCL on a GPU."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in places.items()}
    init = init or tempfile.mkdtemp(prefix="group") + "/init"
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{init}", rank=rank, world_size=world)


@lru_cache
def data_folder() -> Path:
    """The data of this process."""
    folder = Path(tempfile.mkdtemp(prefix="gpu-check"))
    make_data(folder)
    return folder


@lru_cache
def on_cpu(settings: tuple[tuple[str, ...], ...]) -> dict[tuple[str, ...], list[float]]:
    """The losses of runs on the CPU, from a process without a GPU: DeepSpeed chooses its device when it is imported."""
    command = [sys.executable, "-m", "jobs.gpu.curves", str(data_folder()), json.dumps(settings)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"the losses on the CPU: {done.stderr[-2000:]}")
    return dict(zip(settings, json.loads(done.stdout.splitlines()[-1]), strict=True))


def main(arguments: list[str]) -> None:
    """Print the losses of each list of settings as JSON."""
    folder, settings = Path(arguments[0]), json.loads(arguments[1])
    device = torch.device("cpu")
    process_group(device)
    print(json.dumps([losses(folder, each, device) for each in settings]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
