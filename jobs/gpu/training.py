"""Training a tiny model: on the GPU as on the CPU, in every stage, dtype and method."""

from functools import partial

import torch
import torch.distributed as dist

from jobs.gpu.check import Check, Figures, Needs, expect
from jobs.gpu.curves import config_of, data_folder, engine_of, losses, on_cpu, process_group
from smolray.data.local import LocalStream, local_plan
from smolray.train.loop import normalisers_of

FP32, LORA = "model.dtype=float32", "lora={r: 4}"
ADAPTERS = (LORA, "model.train=[]")
REFERENCES = {
    "sft": (FP32, "engine.stage=0"),
    "lora": (FP32, *ADAPTERS, "engine.stage=0"),
    "dpo": (FP32, "method=dpo", "engine.stage=0"),
    "retrieval": (FP32, "method=retrieval", "engine.stage=0"),
}
# settings, the reference, and how far a loss may be from it, relative to it
CURVES: dict[str, tuple[tuple[str, ...], str, float]] = {
    **{f"zero-{stage}": ((FP32, f"engine.stage={stage}"), "sft", 1e-3) for stage in range(4)},
    "bf16": (("model.dtype=bfloat16", "engine.stage=2"), "sft", 5e-2),
    "bf16 stage 0": (("model.dtype=bfloat16", "engine.stage=0"), "sft", 5e-2),
    "lora": ((FP32, *ADAPTERS, "engine.stage=2"), "lora", 1e-3),
    "qlora-4": (("model.dtype=bfloat16", *ADAPTERS, "model.load_in_4bit=true", "engine.stage=0"), "lora", 2e-1),
    "qlora-8": (("model.dtype=bfloat16", *ADAPTERS, "model.load_in_8bit=true", "engine.stage=0"), "lora", 1e-1),
    "8-bit adam": ((FP32, "engine.stage=0", "optimizer.name=adamw_8bit"), "sft", 5e-2),
    "dpo": ((FP32, "method=dpo", "engine.stage=2"), "dpo", 1e-3),
    "retrieval": ((FP32, "method=retrieval", "engine.stage=2"), "retrieval", 1e-3),
    "offload": ((FP32, "engine.stage=2", "engine.offload_optimizer=cpu"), "sft", 1e-3),
}
NEEDS = {
    "bf16": Needs(bf16=True),
    "bf16 stage 0": Needs(bf16=True),
    "qlora-4": Needs(bf16=True, packages=("bitsandbytes",)),
    "qlora-8": Needs(bf16=True, packages=("bitsandbytes",)),
    "8-bit adam": Needs(packages=("bitsandbytes",)),
}


def ready(device: torch.device) -> None:
    """The process group of this section, and products in full fp32."""
    torch.backends.cudnn.allow_tf32 = False
    if not dist.is_initialized():
        process_group(device)


def reference(name: str) -> list[float]:
    """The losses of REFERENCES[name] on the CPU; the first call computes all."""
    return on_cpu(tuple(REFERENCES.values()))[REFERENCES[name]]


def curve(name: str, device: torch.device) -> Figures:
    """The losses of a run beside those of the CPU."""
    ready(device)
    settings, wanted, limit = CURVES[name]
    found, expected = losses(data_folder(), settings, device), reference(wanted)
    worst = max(abs(a - b) / max(abs(b), 1e-6) for a, b in zip(found, expected, strict=True))
    figures = {"losses": found, "cpu_fp32": expected, "largest_difference": worst}
    return expect(worst < limit, f"the losses differ by {worst:.1e}, expected below {limit:g}", figures)


def overflow(device: torch.device) -> Figures:
    """fp16 with a loss scale that must overflow: the step is skipped, the weights stay, the next ones train."""
    ready(device)
    config = config_of(data_folder(), ["model.dtype=float16", "engine.stage=2"])
    engine = engine_of(config, device)
    engine.engine.optimizer.loss_scaler.cur_scale = 2.0**60  # type: ignore[attr-defined]  # DeepSpeed's
    shards = str(data_folder() / "shards")
    plan, steps = local_plan(shards, config), []
    for _ in range(60):
        batches = list(LocalStream(shards, plan, [0, 1], config))
        engine.accumulate(iter(batches), 2, normalisers_of(plan, range(2)))
        steps.append(engine.step(1e-3))
        if not steps[-1].skipped:
            break
    figures = {"skipped": sum(step.skipped for step in steps), "scale": steps[-1].loss_scale}
    return expect(steps[0].skipped and not steps[-1].skipped, "an overflow was not skipped, or all were", figures)


def resume(device: torch.device) -> Figures:
    """A run that is saved in the middle and goes on has the losses of one that was not."""
    ready(device)
    settings = (FP32, "engine.stage=2")
    whole = losses(data_folder(), settings, device)
    halves = losses(data_folder(), settings, device, resumed_after=3)
    worst = max(abs(a - b) for a, b in zip(whole, halves, strict=True))
    return expect(worst < 1e-4, f"the losses differ by {worst:.1e}", {"losses": halves, "largest_difference": worst})


CHECKS = (
    *(
        Check(
            name,
            f"Are the losses those of the CPU ({' '.join(settings)})?",
            partial(curve, name),
            NEEDS.get(name, Needs()),
        )
        for name, (settings, *_) in CURVES.items()
    ),
    Check("fp16 overflow", "Is a step that overflows skipped, and the next one not?", overflow),
    Check("resume", "Does a resumed run go on with the same losses?", resume),
)
