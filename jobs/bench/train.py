"""Benchmarks of the training step: smolray, TRL's trainers and a plain PyTorch loop, on the same samples.

In: easy-vqa's images with some of their questions, and a random model with SmolVLM's vocabulary. Out: a Result for each
case, with costs per conversation (or pair). Each way runs in a process of its own (peers.py). They take turns of some
optimizer steps, after one step to warm up. The cost includes reading, decoding and collating. TRL's figure is the
fastest of a sweep: DataLoader workers 0 and 2, gradient checkpointing on and off.
"""

import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from jobs.bench.flops import Work
from jobs.bench.peers import Task, Turn, serve
from jobs.bench.timing import Cost, Result

QUESTIONS = (3, 4, 5, 6, 9)  # per image, in turn: 5.4 on average, as in VQAv2
BATCH = 16  # conversations, or pairs, in an optimizer step
STEPS = 2  # in a turn
TRUE_SHAPES = ("random-256m", "random-500m", "random-2.2b")  # for a GPU: on a CPU a step takes minutes
SWEEP = tuple(f"trl,workers={workers},checkpointing={on}" for workers in (0, 2) for on in (0, 1))


@dataclass(frozen=True)
class Case:
    """One comparison: questions per image, settings of all ways and of ours alone, whether the plain loop can do it."""

    what: str
    questions: tuple[int, ...]
    overrides: tuple[str, ...] = ()
    ours: tuple[str, ...] = ()
    plain: bool = True


CASES = {
    "sft_multi_question": Case("SFT, everything trained, 5.4 questions per image", QUESTIONS),
    "sft_single_question": Case("SFT, everything trained, one question per image", (1,)),
    "sft_frozen_cached": Case(
        "SFT, vision and connector frozen, second epoch, 5.4 questions per image",
        QUESTIONS,
        ("model.train=[text]",),
        ("model.vision_features=precompute",),
    ),
    "dpo": Case("DPO, everything trained, one pair per image", (1,), ("method=dpo",), plain=False),
}


def train_case(name: str, model: str, scale: float, repetitions: int, sweep: Sequence[str] = SWEEP) -> list[Result]:
    """One case; `scale` below 1 takes fewer conversations a step. TRL's way is the fastest of `sweep`."""
    case, batch = CASES[name], max(2, int(BATCH * scale))
    steps = 3 + STEPS * (repetitions + 1)
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        task = make_task(Path(folder), case, model, batch, steps)
        trl = min(sweep, key=lambda way: _first_turn(way, task)) if len(sweep) > 1 else sweep[0]
        ways = {"ours": ("ours", with_settings(task, case.ours)), trl: (trl, task)} | (
            {"plain loop": ("plain", task)} if case.plain else {}
        )
        turns = take_turns(ways, repetitions)
        ours_flops, peer_flops = _operations(task, case, batch) if case.plain else (None, None)
    costs = {
        way: [Cost(t.wall_s / t.items * batch, t.cpu_s / t.items * batch, t.peak_mb) for t in found]
        for way, found in turns.items()
    }
    unit, trainer = ("pair", "DPOTrainer") if "method=dpo" in case.overrides else ("conversation", "SFTTrainer")
    named = {trl: f"TRL {trainer} ({trl.removeprefix('trl,')})", "plain loop": "plain loop, labels-only head"}
    clock = "wall" if on_gpu() else "cpu"
    return [
        Result(
            name if way == trl else f"{name}_plain",
            f"{case.what}, {model}",
            batch,
            unit,
            named[way],
            costs["ours"],
            costs[way],
            clock,
            ours_flops,
            peer_flops,
        )
        for way in ways
        if way != "ours"
    ]


def _operations(task: Task, case: Case, batch: int) -> tuple[float, float]:
    """Floating-point operations of a step: ours, and with each conversation as a sequence of its own."""
    work = Work.of(task.shards, with_settings(task, case.ours).overrides, batch)
    return batch * work.training, batch * work.separate


def cases(model: str) -> dict[str, Callable[[float, int], list[Result]]]:
    """The cases as jobs/benchmark.py runs them."""
    return {name: partial(train_case, name, model) for name in CASES}


def make_task(folder: Path, case: Case, model: str, batch: int, steps: int) -> Task:
    """Shards and model of a case, enough for `steps` steps."""
    from smolray.data.shards import write_shards
    from smolray.model.tiny import build_model

    rows = list(image_rows(batch * (steps + 2), case.questions, pairs="method=dpo" in case.overrides))
    shards = write_shards(str(folder / "shards"), rows, source="benchmark")
    texts = [m.text for row in rows for c in row.conversations for m in (*c.messages, *c.chosen, *c.rejected)]
    build_model(model, texts, folder / "model")

    cuda = on_gpu()
    overrides = (
        f"model.path={folder / 'model'}",
        f"model.dtype={dtype()}",
        "engine.stage=0",
        "image.upscale=true",
        f"image.longest_edge={longest_edge(model)}",
        "optimizer.lr_scheduler_type=constant",
        "train.num_train_epochs=2",
        *case.overrides,
    )
    return Task(shards, overrides, batch, steps, threads=16 if cuda else 1)


def with_settings(task: Task, settings: tuple[str, ...]) -> Task:
    """The task of our side."""
    return replace(task, overrides=(*task.overrides, *settings))


def image_rows(conversations: int, questions: tuple[int, ...], pairs: bool) -> Iterator[Any]:
    """Rows of easy-vqa's training images, each with `questions[number]` of its questions, in turn."""
    from jobs.easyvqa import preference_rows, vqa_rows
    from smolray.data.sample import ShardRow

    left = conversations
    for number, row in enumerate((preference_rows if pairs else vqa_rows)("train", conversations)):
        kept = row.conversations[: min(questions[number % len(questions)], left)]
        left -= len(kept)
        yield ShardRow(row.key, row.images, kept)
        if left <= 0:
            return


def take_turns(ways: dict[str, tuple[str, Task]], repetitions: int) -> dict[str, list[Turn]]:
    """The turns of each way, in turn, so that other work on the machine slows all. The first is left out."""
    turns: dict[str, list[Turn]] = {name: [] for name in ways}
    with ExitStack() as stack:
        asks = {name: stack.enter_context(process(way, task)) for name, (way, task) in ways.items()}
        for repetition in range(repetitions + 1):
            for name, ask in asks.items():
                turn = ask(STEPS)
                if repetition:
                    turns[name].append(turn)
    return turns


def _first_turn(way: str, task: Task) -> float:
    """Seconds of one step after the first, by the clock that counts."""
    with process(way, task) as ask:
        turn = ask(1)
    return turn.wall_s if on_gpu() else turn.cpu_s


def on_gpu() -> bool:
    """Whether this machine has a GPU, which the ways then train on."""
    import torch

    return torch.cuda.is_available()


def dtype() -> str:
    """What the ways compute in here."""
    return "bfloat16" if on_gpu() else "float32"


def longest_edge(model: str) -> int:
    """Pixels to which an image is scaled: of four tiles and the whole for a true shape, else of one."""
    from smolray.model.tiny import SHAPES

    return int(SHAPES[model]["vision"]["image_size"]) * (2 if model in TRUE_SHAPES else 1)


@contextmanager
def process(way: str, task: Task) -> Iterator[Callable[[int], Turn]]:
    """A process that trains in this way, warmed up by one step; call it with the number of steps to take."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=serve, args=(there, way, task))
    child.start()
    there.close()

    def receive() -> Turn:
        try:
            found = here.recv()
        except EOFError:
            raise RuntimeError(f"{way} died; its error is printed above") from None
        if "error" in found:
            raise RuntimeError(found["error"])
        return Turn(**found)

    def ask(steps: int) -> Turn:
        here.send(steps)
        return receive()

    receive()
    try:
        yield ask
    finally:
        here.send(0)
        child.join(30)
        if child.is_alive():
            child.kill()
