"""True shapes: seconds and bytes of a step, beside what the planner says, and decoding.

The weights and the data are random: only their sizes matter.
"""

import time
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from transformers import Idefics3Config, Idefics3ForConditionalGeneration

from jobs.gpu.check import Check, Figures, Needs
from jobs.gpu.curves import process_group
from smolray.config import load_config
from smolray.data.batch import Batch
from smolray.model import attention
from smolray.model.adapters import prepare_for_training
from smolray.model.decoding import greedy
from smolray.model.kernels import use_kernels
from smolray.model.load import base_model
from smolray.model.tiny import SHAPES
from smolray.objectives.base import Normalisers
from smolray.objectives.registry import objective_of
from smolray.planner.gpus import GPU
from smolray.planner.inventory import PCIE, measured_gpu
from smolray.planner.memory import Workload, Zero, zero_memory
from smolray.planner.probe import copy_bandwidth, free_memory, gpu_name, matmul_tflops
from smolray.planner.shapes import ModelShape, Training
from smolray.planner.statistics import Load
from smolray.planner.zero_time import divide, zero_seconds
from smolray.pretrained import DTYPES

IMAGE_TOKEN, TOKENS, TILES, TRAINED, MICRO_BATCHES = 3, 2000, 17, 32, 4
# shape, settings, needs
CASES: dict[str, tuple[str, tuple[str, ...], Needs]] = {
    "256m stage 0": ("random-256m", ("engine.stage=0",), Needs(bf16=True, memory_gib=11)),
    "256m stage 2": ("random-256m", ("engine.stage=2",), Needs(bf16=True, memory_gib=11)),
    "256m stage 2, offload": (
        "random-256m",
        ("engine.stage=2", "engine.offload_optimizer=cpu"),
        Needs(bf16=True, memory_gib=11),
    ),
    "2.2b lora": (
        "random-2.2b",
        ("model.train=[]", "model.gradient_checkpointing=true", "lora={r: 8}", "engine.stage=0"),
        Needs(bf16=True, memory_gib=22),
    ),
}


def random_model(shape: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A model of a shape with random weights, made on the device."""
    spec = SHAPES[shape]
    config = Idefics3Config(
        vision_config=spec["vision"],
        text_config={
            **spec["text"],
            "model_type": "llama",
            "vocab_size": spec["vocab_size"] or 1000,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e5,
            "tie_word_embeddings": False,
        },
        scale_factor=spec["scale_factor"],
        image_token_id=IMAGE_TOKEN,
        tie_word_embeddings=False,
    )
    with device:
        model = Idefics3ForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.config.use_cache = False
    model.set_attn_implementation({"text_config": attention.NAME})
    return model


def random_batch(model: nn.Module, rows: int, tokens: int, tiles: int, trained: int, flat: bool) -> Batch:
    """`rows` sequences of equal length: end to end with `flat`, then with `tokens` in all, else with so many each."""
    config = base_model(model).config
    vision, text = config.vision_config, config.text_config
    per_tile = (vision.image_size // vision.patch_size) ** 2 // config.scale_factor**2
    shape = (1, tokens) if flat else (rows, tokens)
    total = shape[0] * tokens
    tiles = min(tiles, total // per_tile)
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(10, text.vocab_size, (total,), generator=rng)
    ids[: tiles * per_tile] = IMAGE_TOKEN
    length = tokens // rows if flat else tokens
    lengths = [length] * (rows - 1) + [tokens - length * (rows - 1)] if flat else []
    positions = torch.arange(total) % length
    targets = torch.linspace(0, total - 1, trained).long()
    side = vision.image_size
    return Batch(
        input_ids=ids.view(shape),
        position_ids=positions.view(shape),
        branch=torch.zeros(shape, dtype=torch.int64),
        lengths=torch.tensor(lengths, dtype=torch.int64),
        pixel_values=torch.randint(0, 256, (tiles, 3, side, side), dtype=torch.uint8, generator=rng),
        features=torch.zeros(0, 0, 0),
        tile_order=torch.arange(tiles),
        target_positions=targets,
        target_ids=torch.randint(10, text.vocab_size, (trained,), generator=rng),
        target_completion=torch.zeros(trained, dtype=torch.int64),
        ends=torch.arange(1, rows + 1) * length - 1,
        reference_logps=torch.zeros(0),
        image_positions=torch.arange(tiles * per_tile),
        meta={"number": 0, "tokens": total, "ids": ["a"] * rows, "tiles_in_order": True, "branched": False},
    )


class Step:
    """A step of four micro-batches of 2,000 tokens and 17 tiles, of a case."""

    def __init__(self, name: str, device: torch.device):
        from smolray.engine.zero import ZeroEngine

        shape, settings, _ = CASES[name]
        self.config, self.device = load_config(None, settings), device
        if not dist.is_initialized():
            process_group(device)
        model = prepare_for_training(random_model(shape, DTYPES[self.config.model.dtype], device), self.config)
        use_kernels(model, self.config.model)
        self.engine = ZeroEngine(model, objective_of(self.config), self.config, device)
        self.batch = random_batch(model, 3, TOKENS, TILES, TRAINED, flat=True)
        self.shape = ModelShape.from_config(base_model(model).config.to_dict(), shape)

    def accumulate(self) -> None:
        """All micro-batches, forward and backward."""
        normalisers = Normalisers(3 * MICRO_BATCHES, TRAINED * MICRO_BATCHES, 0)
        self.engine.accumulate(iter([self.batch] * MICRO_BATCHES), MICRO_BATCHES, normalisers)

    def update(self) -> None:
        """The optimizer's step."""
        self.engine.step(1e-4)

    def planned(self) -> tuple[Workload, Zero]:
        """The step as the planner sees it."""
        load = Load(8, 3, TOKENS, TOKENS**2 / 6, 0.0, TILES, TRAINED)
        model, engine = self.config.model, self.config.engine
        training = Training.of(self.config)
        work = Workload(self.shape, training, load, model.gradient_checkpointing, self.config.optimizer.name)
        return work, Zero(self.config.zero_stage, 1, engine.offload_optimizer == "cpu")


def training(name: str, device: torch.device) -> Figures:
    """Seconds of a step, and bytes beside the planner's."""
    step, seconds = Step(name, device), []
    for _ in range(4):
        torch.cuda.reset_peak_memory_stats(device)
        began = time.perf_counter()
        step.accumulate()
        step.update()
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)

    free, total = torch.cuda.mem_get_info(device)
    taken = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device), total - free
    return step_figures(min(seconds[1:]), taken, *step.planned(), measured_gpu_of(device))


def measured_gpu_of(device: torch.device) -> GPU:
    """The device as the planner sees it, with the speeds that a run's probe measures."""
    fast, plain = (matmul_tflops(device, dtype) for dtype in ("bfloat16", "float32"))
    return measured_gpu(gpu_name(device), free_memory(device), fast, plain, copy_bandwidth(device))


def step_figures(seconds: float, taken: tuple[int, int, int], work: Workload, zero: Zero, gpu: GPU) -> Figures:
    """A step beside what the planner says, for people and for planner/calibration.py.

    `taken`: bytes allocated, reserved, and in use on the GPU.
    """
    allocated, reserved, used = taken
    planned = zero_memory(work, zero, several=True)
    division = divide(work, (gpu,), (0,), MICRO_BATCHES, by_speed=True)
    expected = zero_seconds(work, zero, (gpu,), PCIE, division, data=0.0).total
    mib = 2**20
    return {
        "seconds_a_step": round(seconds, 4),
        "planned_seconds": round(expected, 4),
        "tokens_a_second": round(TOKENS * MICRO_BATCHES / seconds),
        "allocated_mib": round(allocated / mib),
        "reserved_mib": round(reserved / mib),
        "of_the_gpu_mib": round(used / mib),
        "planned_mib": round(planned.total / mib),
        "planned_over_allocated": round(planned.tensors / allocated, 3),
        "offloaded": zero.offload_optimizer,
    }


def decoding(shape: str, rows: int, device: torch.device) -> Figures:
    """32 tokens after prompts of 1,200 tokens."""
    model = random_model(shape, torch.float16, device).eval()
    batch = random_batch(model, rows, 1200, TILES, 0, flat=False).to(device)
    greedy(model, batch, 2, {0})
    torch.cuda.reset_peak_memory_stats(device)
    seconds = {}
    for tokens in (1, 33):
        began = time.perf_counter()
        greedy(model, batch, tokens, {0})
        torch.cuda.synchronize(device)
        seconds[tokens] = time.perf_counter() - began
    return {
        "prompt_seconds": round(seconds[1], 4),
        "milliseconds_a_token": round((seconds[33] - seconds[1]) / 32 * 1000, 2),
        "tokens_a_second": round(rows * 32 / (seconds[33] - seconds[1])),
        "allocated_mib": round(torch.cuda.max_memory_allocated(device) / 2**20),
    }


TRAINING = tuple(
    Check(
        name, "How long is a step, and what does it take beside what the planner says?", partial(training, name), needs
    )
    for name, (_, _, needs) in CASES.items()
)
DECODING = (
    Check("256m, 16 rows", "How fast is decoding?", partial(decoding, "random-256m", 16), Needs(memory_gib=7)),
    Check("2.2b, 8 rows", "How fast is decoding?", partial(decoding, "random-2.2b", 8), Needs(memory_gib=15)),
)
