"""The ways to train that jobs/bench/train.py compares: smolray, TRL's trainers, a plain PyTorch loop.

In: a Task (shards, model, settings) and a connection to the process that measures. Out: the cost of as many optimizer
steps as it asks for. All ways see the same conversations in the same order, as many a step, and train with AdamW in the
same dtype.
"""

import io
import os
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import psutil  # type: ignore[import-untyped]


@dataclass(frozen=True)
class Task:
    """What each way gets. `overrides`: settings of the run; `batch`: conversations, or pairs, in a step."""

    shards: str
    overrides: tuple[str, ...]
    batch: int
    steps: int  # as many as there is data for
    threads: int


@dataclass(frozen=True)
class Turn:
    """What some steps cost. `cpu_s` counts the process and its children; `peak_mb` is the peak so far."""

    cpu_s: float
    wall_s: float
    items: int
    peak_mb: float


class Stop(Exception):
    """The benchmark asks for no more steps."""


class Meter:
    """Counts optimizer steps, sends a Turn when enough are done, and waits for the next number of steps (0: stop)."""

    def __init__(self, connection: Connection):
        self.connection = connection
        self.wanted, self.steps, self.items = 1, 0, 0
        self.began, self.cpu = time.perf_counter(), cpu_seconds()

    def __call__(self, items: int) -> None:
        self.steps, self.items = self.steps + 1, self.items + items
        if self.steps < self.wanted:
            return
        synchronize()
        turn = Turn(cpu_seconds() - self.cpu, time.perf_counter() - self.began, self.items, peak_mb())
        self.connection.send(asdict(turn))
        self.wanted = self.connection.recv()
        if not self.wanted:
            raise Stop
        self.steps, self.items = 0, 0
        self.began, self.cpu = time.perf_counter(), cpu_seconds()


def serve(connection: Connection, way: str, task: Task) -> None:
    """Run a way in this process until the other side says stop."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch

    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(task.threads)
    name, *options = way.split(",")
    try:
        WAYS[name](task, Meter(connection), dict(option.split("=") for option in options))
    except Stop:
        return
    connection.send({"error": f"{way} ended after its data: {task.steps} steps are too few"})


def ours(task: Task, meter: Meter, options: dict[str, str]) -> None:
    """smolray: the loop and its engine, micro-batches read and collated in this process."""
    import tempfile

    import torch.distributed as dist

    from smolray.config import load_config
    from smolray.data.local import LocalStream, local_plan
    from smolray.engine.zero import ZeroEngine
    from smolray.model.adapters import prepare_for_training
    from smolray.model.load import load_model
    from smolray.model.parts import drop_submodules, frozen_prefix
    from smolray.objectives.registry import objective_of
    from smolray.precompute.local import local_sidecars
    from smolray.run.checkpoint import Progress
    from smolray.train.loop import TrainLoop

    device = training_device()
    # for DeepSpeed, and for it alone: accelerate would take them for a launcher's, and on a GPU look for its port
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", init_method=f"file://{folder}/init", rank=0, world_size=1
        )
        config = load_config(None, [*task.overrides, f"train.per_device_train_batch_size={task.batch}"])
        plans = [local_plan(task.shards, config, epoch) for epoch in range(2)]
        sidecars = local_sidecars(task.shards, config, str(device))  # made before the clock starts
        model = prepare_for_training(load_model(config.model), config)
        if sidecars.features:
            drop_submodules(model, frozen_prefix(config))
        engine = ZeroEngine(model, objective_of(config), config, device)
        run = config.replace({"train.max_steps": task.steps})
        TrainLoop(
            run,
            engine,
            plans,
            lambda plan, numbers: LocalStream(task.shards, plan, numbers, config, sidecars),
            Progress(),
            [lambda step_info: meter(step_info.metrics.samples)],
        ).run()


def plain(task: Task, meter: Meter, options: dict[str, str]) -> None:
    """A careful plain loop: transformers' forward, no packing, the head only where there are labels."""
    import torch
    from torch.nn import functional as F
    from transformers import AutoModelForImageTextToText

    from smolray.config import load_config
    from smolray.data.local import LocalStream, local_plan
    from smolray.model.load import freeze
    from smolray.pretrained import DTYPES

    config = load_config(
        None, [*task.overrides, "data.packing=none", f"train.per_device_train_batch_size={task.batch}"]
    )
    device = training_device()
    model = (
        AutoModelForImageTextToText.from_pretrained(config.model.path, dtype=DTYPES[config.model.dtype])
        .to(device)
        .train()
    )
    freeze(model, config.model.train)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=config.optimizer.learning_rate)
    plan = local_plan(task.shards, config)
    for batch in LocalStream(task.shards, plan, range(len(plan)), config):
        batch = batch.to(device)
        pixels = (
            ((batch.pixel_values.float() / 255 - 0.5) / 0.5)[batch.tile_order]
            .unflatten(0, (len(batch.input_ids), -1))
            .to(model.dtype)
        )
        hidden = model.model(
            input_ids=batch.input_ids, attention_mask=(batch.branch >= 0).long(), pixel_values=pixels, use_cache=False
        ).last_hidden_state
        logits = model.lm_head(hidden.flatten(0, 1)[batch.target_positions]).float()
        F.cross_entropy(logits, batch.target_ids).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        meter(batch.samples)


def trl(task: Task, meter: Meter, options: dict[str, str]) -> None:
    """TRL's SFTTrainer (completion-only) or DPOTrainer.

    Options: workers (of the DataLoader), checkpointing (0 or 1).
    """
    import tempfile

    import torch
    from datasets import Dataset
    from transformers import AutoModelForImageTextToText, TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from smolray.config import load_config
    from smolray.data.processor import load_processor
    from smolray.model.load import freeze
    from smolray.pretrained import DTYPES

    config = load_config(None, list(task.overrides))
    model = AutoModelForImageTextToText.from_pretrained(config.model.path, dtype=DTYPES["float32"])
    freeze(model, config.model.train)
    pairs = config.traits.pairs

    class StepCallback(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            torch.set_num_threads(task.threads)  # accelerate may have raised it

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            meter(task.batch)

    base: Any = DPOTrainer if pairs else SFTTrainer

    class InOrder(base):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    with tempfile.TemporaryDirectory() as folder:
        common = _common_arguments(task, config, options) | {"output_dir": folder}
        arguments = DPOConfig(**common) if pairs else SFTConfig(**common, completion_only_loss=True)
        processor = load_processor(config.model)
        if config.image.longest_edge:
            processor.image_processor.size = {"longest_edge": config.image.longest_edge}
        data = Dataset.from_list(list(_records(task, config)))
        InOrder(
            model=model, args=arguments, train_dataset=data, processing_class=processor, callbacks=[StepCallback()]
        ).train()


def _common_arguments(task: Task, config: Any, options: dict[str, str]) -> dict[str, Any]:
    """What SFTConfig and DPOConfig share."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "per_device_train_batch_size": task.batch,
        "max_steps": task.steps,
        "learning_rate": config.optimizer.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "bf16": cuda,
        "gradient_checkpointing": options["checkpointing"] == "1",
        "max_length": None,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": not cuda,
        "logging_steps": 10**6,
        "disable_tqdm": True,
        "dataloader_num_workers": int(options["workers"]),
        "dataloader_pin_memory": cuda,
    }


def _records(task: Task, config: Any) -> Iterator[dict[str, Any]]:
    """The conversations in the plan's order, as TRL takes them."""
    from PIL import Image

    from smolray.data.local import local_plan
    from smolray.data.reader import ShardReader

    plan = local_plan(task.shards, config)
    reader = ShardReader.open(task.shards)
    for number in range(len(plan)):
        for group in reader.groups([plan.micro_batch(number)])[0]:
            image = Image.open(io.BytesIO(group.row.images[0])).convert("RGB")
            for c in group.selected:
                prompt = [
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": c.messages[0].text}]}
                ]
                record: dict[str, Any] = {"images": [image], "prompt": prompt}
                endings = (
                    {"chosen": c.chosen[0], "rejected": c.rejected[0]}
                    if c.is_preference
                    else {"completion": c.messages[1]}
                )
                for name, message in endings.items():
                    record[name] = [{"role": "assistant", "content": [{"type": "text", "text": message.text}]}]
                yield record


def training_device() -> Any:
    """The GPU where there is one."""
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def cpu_seconds() -> float:
    """Of this process and its children, the ended ones included."""
    me = psutil.Process()
    own = me.cpu_times()
    total = own.user + own.system + own.children_user + own.children_system
    for child in me.children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return float(total)


def peak_mb() -> float:
    """Peak memory: what the GPU's allocator has handed out, or what the process has had resident."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


WAYS: dict[str, Callable[[Task, Meter, dict[str, str]], None]] = {"ours": ours, "plain": plain, "trl": trl}
