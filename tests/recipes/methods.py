"""The methods that the parity tests compare, and what they run inside gloo workers."""

from collections.abc import Sequence

import torch.distributed as dist

from smolray.config import load_config
from smolray.data.local import local_plan
from smolray.engine import zero
from smolray.model.load import base_model
from smolray.run.checkpoint import Progress
from smolray.train.loop import TrainLoop
from tests.gloo import build_engine
from tests.recipes.curves import curve, stream_of

STEPS = 6
EVERYWHERE, TEXT = "lora={r: 4, lora_dropout: 0.1, groups: [text, vision, connector]}", "lora={r: 4, lora_dropout: 0.1}"
ADAPTERS = {
    "dora": ["lora={r: 4, use_dora: true, groups: [text, vision]}", "model.train=[]"],
    "rslora": ["lora={r: 4, use_rslora: true, groups: [text, vision], ranks: {vision: 2}}", "model.train=[]"],
    "bf16": [EVERYWHERE, "model.train=[]", "model.dtype=bfloat16"],
    "4-bit": [TEXT, "model.train=[]", "model.dtype=bfloat16", "model.load_in_4bit=true"],
    "4-bit-dora": ["lora={r: 4, use_dora: true}", "model.train=[]", "model.load_in_4bit=true"],
    "8-bit": [TEXT, "model.train=[]", "model.dtype=bfloat16", "model.load_in_8bit=true"],
    # a part of the weights taken out of them, modules trained whole beside it, and noise
    "pissa": [
        "lora={r: 4, groups: [text, vision], init_lora_weights: pissa, modules_to_save: [embed_tokens, connector]}",
        "model.train=[]",
        "train.neftune_noise_alpha=5",
    ],
    "loftq": ["lora={r: 4, init_lora_weights: loftq}", "model.train=[]", "model.load_in_4bit=true"],
}
METHODS = ADAPTERS | {
    "8-bit-adam": ["optimizer.name=adamw_8bit"],
    "paged-8-bit-adam": [
        EVERYWHERE.replace("r: 4", "r: 64"),
        "model.train=[]",
        "optimizer.name=paged_adamw_8bit",
        "model.dtype=bfloat16",
    ],
    "bf16-8-bit-adam": ["model.dtype=bfloat16", "optimizer.name=adamw_8bit"],
    "rates": ["optimizer.learning_rates={vision: 1e-4, connector: 2e-3}"],
}
STAGES = dict.fromkeys(ADAPTERS, (0, 2)) | {
    "dora": (0, 1, 2, 3),
    "pissa": (0, 2, 3),
    "loftq": (0,),
    "8-bit-adam": (0,),
    "paged-8-bit-adam": (0,),
    "bf16-8-bit-adam": (0,),
    "rates": (0, 2, 3),
}


def after_zero3(shards: str, overrides: list[str]) -> list[list[tuple[float, float]]]:
    """The curve of bf16 weights in a fresh process, and again after a ZeRO-3 engine has lived in it."""
    again = [*overrides, *METHODS["bf16-8-bit-adam"]]
    fresh = curve(shards, again, STEPS)
    curve(shards, [*overrides, "engine.stage=3"], 1)
    return [fresh, curve(shards, again, STEPS)]


def saved(names: Sequence[str], shards: str, overrides: list[str], root: str) -> dict[str, list[tuple[float, float]]]:
    """The first half of each method's curve under its highest stage, saved in `root/<method>`."""
    return {
        name: curve(
            shards, [*overrides, *METHODS[name], f"engine.stage={max(STAGES[name])}"], STEPS // 2, f"{root}/{name}"
        )
        for name in names
    }


def resumed(names: Sequence[str], shards: str, overrides: list[str], root: str) -> dict[str, list[tuple[float, float]]]:
    """The rest of each, read from there, under stage 0."""
    return {name: curve(shards, [*overrides, *METHODS[name]], STEPS, f"{root}/{name}", True) for name in names}


def whole_parts(shards: str, overrides: list[str]) -> list[dict[str, bool]]:
    """ZeRO-3: whether a part's weights are whole on this worker after training, in an evaluation, and after it."""
    plain = zero.deepspeed_config

    def none_is_small(*args, **settings):  # DeepSpeed leaves whole what is below 100,000 values: all of this model
        found = plain(*args, **settings)
        return found | {"zero_optimization": found["zero_optimization"] | {"stage3_param_persistence_threshold": 0}}

    zero.deepspeed_config = none_is_small
    config = load_config(None, [*overrides, "engine.stage=3", "train.max_steps=2"])
    engine = build_engine(config)
    found = []

    def look() -> None:
        inner = base_model(engine.model).model
        parts = {"vision": inner.vision_model, "connector": inner.connector, "text": inner.text_model}
        found.append({name: all(p.numel() for p in part.parameters()) for name, part in parts.items()})

    TrainLoop(config, engine, [local_plan(shards, config)], stream_of(shards, config), Progress()).run()
    look()
    with engine.gathered():
        look()
    look()
    dist.barrier()
    return found
