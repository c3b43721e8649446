"""Learning-rate schedules, each a function of the step: those of transformers.get_scheduler, to the last digit.

In: the settings of the optimizer and the number of steps. Out: the learning rate of a step. transformers' own module
loads PEFT and bitsandbytes, which would cost every worker two seconds at its start.
"""

import math
from collections.abc import Callable
from typing import Any

from smolray.config import OptimizerConfig

# The shapes of a rise and a fall from 0 to 1 of the way, by their names in lr_scheduler_kwargs.
RISES: dict[str, Callable[[float], float]] = {
    "linear": lambda way: way,
    "cosine": lambda way: 0.5 * (1.0 - math.cos(math.pi * way)),
    "1-sqrt": lambda way: 1.0 - math.sqrt(1.0 - way),
}
FALLS: dict[str, Callable[[float, float], float]] = {
    "linear": lambda way, cycles: 1.0 - way,
    "cosine": lambda way, cycles: 0.5 * (1.0 + math.cos(math.pi * cycles * 2.0 * way)),
    "1-sqrt": lambda way, cycles: 1.0 - math.sqrt(way),
}


def schedule(config: OptimizerConfig, total_steps: int) -> Callable[[int], float]:
    """The learning rate as a function of the optimizer step (0, 1, …)."""
    kind, settings = config.lr_scheduler_type, dict[str, Any](config.lr_scheduler_kwargs)
    warmup = 0 if kind == "constant" else config.warmup_steps or round(config.warmup_ratio * total_steps)
    start = config.learning_rate or 1.0  # min_lr and lr_end are relative to it
    if kind == "polynomial":
        settings["start"] = start
    if "min_lr" in settings:
        settings["min_lr_rate"] = settings.pop("min_lr") / start
    shape, least = settings.pop("warmup_type", "linear"), settings.get("min_lr_ratio", 0.0)

    def factor(step: int) -> float:
        if step >= warmup:
            return FACTORS[kind](step, warmup, total_steps, **settings)
        return _above(least, RISES[shape](step / warmup))

    return lambda step: config.learning_rate * float(factor(step))


def _above(least: float, factor: float) -> float:
    """`factor`, 0 to 1, as a way from `least` to 1."""
    return max(0.0, factor * (1.0 - least) + least)


def _way(step: int, warmup: int, total: int) -> float:
    """How far a step is between the end of the warmup, 0, and that of the run, 1."""
    return (step - warmup) / max(1, total - warmup)


def _constant(step: int, warmup: int, total: int) -> float:
    return 1.0


def _linear(step: int, warmup: int, total: int) -> float:
    return max(0.0, (total - step) / max(1, total - warmup))


def _cosine(step: int, warmup: int, total: int, num_cycles: float = 0.5, min_lr_rate: float = 0.0) -> float:
    return _above(min_lr_rate, FALLS["cosine"](_way(step, warmup, total), num_cycles))


def _restarts(step: int, warmup: int, total: int, num_cycles: float = 1) -> float:
    way = _way(step, warmup, total)
    return 0.0 if way >= 1.0 else max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((num_cycles * way) % 1.0))))


def _polynomial(step: int, warmup: int, total: int, start: float, lr_end: float = 1e-7, power: float = 1.0) -> float:
    if step > total:
        return lr_end / start
    left = 1 - (step - warmup) / (total - warmup)
    return ((start - lr_end) * left**power + lr_end) / start


def _inverse_sqrt(step: int, warmup: int, total: int, timescale: int | None = None) -> float:
    scale = timescale or warmup or 10_000
    return 1.0 / math.sqrt((step + scale - warmup) / scale)


def _stable_then_decay(
    step: int,
    warmup: int,
    total: int,
    num_decay_steps: int,
    num_stable_steps: int | None = None,
    decay_type: str = "cosine",
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> float:
    stable = total - warmup - num_decay_steps if num_stable_steps is None else num_stable_steps
    if step < warmup + stable:
        return 1.0
    if step >= warmup + stable + num_decay_steps:
        return min_lr_ratio
    way = (step - warmup - stable) / max(1, num_decay_steps)
    return _above(min_lr_ratio, FALLS[decay_type](way, num_cycles))


# The learning rate after the warmup, as a part of the highest, by lr_scheduler_type.
FACTORS: dict[str, Callable[..., float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _restarts,
    "polynomial": _polynomial,
    "constant": _constant,
    "constant_with_warmup": _constant,
    "inverse_sqrt": _inverse_sqrt,
    "cosine_with_min_lr": _cosine,
    "warmup_stable_decay": _stable_then_decay,
}
