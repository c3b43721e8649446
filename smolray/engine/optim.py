"""Optimizers and learning-rate schedules. Neither depends on the number of workers: the rate is a function of the step.

In: parameters by name and OptimizerConfig. Out: an optimizer whose parameter groups carry the scale of their learning
rate, and Adam's moments by parameter: fp32, or 8-bit codes with the largest value of each block of 256, as bitsandbytes
keeps them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from smolray.config import OptimizerConfig
from smolray.model.load import group_of
from smolray.run.state import Moments

FP32 = ("exp_avg", "exp_avg_sq")
CODES = ("state1", "state2", "absmax1", "absmax2")  # bitsandbytes' names
# their moments stay fp32 under 8-bit Adam, as in transformers' Trainer
EMBEDDINGS = ("embed_tokens.weight", "position_embedding.weight")
BLOCK = 256


def build_optimizer(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (fused) or bitsandbytes' 8-bit AdamW, paged or not.

    Biases and norms are not decayed, as in transformers' Trainer. Each parameter group has an `lr_scale`: see
    `set_learning_rate`.
    """
    groups: dict[tuple[float, float, int], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        rate = config.learning_rates.get(group_of(name), config.learning_rate)
        rate *= config.loraplus_lr_ratio if "lora_B" in name else 1.0
        decay = config.weight_decay if parameter.ndim >= 2 else 0.0
        bits = 32 if config.name == "adamw" or name.endswith(EMBEDDINGS) else 8
        groups.setdefault((rate, decay, bits), []).append(parameter)

    settings = [
        {
            "params": members,
            "lr": rate,
            "lr_scale": rate / config.learning_rate if config.learning_rate else 1.0,
            "weight_decay": decay,
            "optim_bits": bits,
        }
        for (rate, decay, bits), members in groups.items()
    ]
    common: Any = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    if config.name == "adamw":
        return torch.optim.AdamW(settings, **common, fused=True)

    import bitsandbytes as bnb

    kind: Any = bnb.optim.AdamW8bit if config.name == "adamw_8bit" else bnb.optim.PagedAdamW8bit

    class BitsByGroup(kind):
        """bitsandbytes' own setting, GlobalOptimManager, goes by id(parameter) for the whole process."""

        def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
            settings: dict[str, Any] = super().get_config(gindex, pindex, group)
            return settings | {"optim_bits": group["optim_bits"]}

    return BitsByGroup(settings, **common)  # type: ignore[no-any-return]


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of the schedule. A group of optimizer.learning_rates follows it in proportion."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]


def schedule(config: OptimizerConfig, total_steps: int) -> Callable[[int], float]:
    """The learning rate as a function of the optimizer step (0, 1, …): transformers' schedule."""
    warmup = config.warmup_steps or round(config.warmup_ratio * total_steps)
    # min_lr and lr_end are relative to its learning rate
    carrier = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.learning_rate or 1.0)
    scheduler = get_scheduler(
        config.lr_scheduler_type,
        carrier,
        num_warmup_steps=warmup,
        num_training_steps=total_steps,
        scheduler_specific_kwargs=config.lr_scheduler_kwargs,
    )

    factor = scheduler.lr_lambdas[0]
    return lambda step: config.learning_rate * float(factor(step))


def moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Moments:
    """Adam's moments of a parameter: FP32 in its shape, or CODES where they are kept in 8 bit.

    Zeros before the first step.
    """
    state = optimizer.state.get(parameter, {})
    if "absmax1" in state:
        return {key: state[key] for key in CODES}
    names = FP32 if "exp_avg" in state else CODES[:2]
    return {
        key: state.get(name, torch.zeros_like(parameter, dtype=torch.float32))
        for key, name in zip(FP32, names, strict=True)
    }


def optimizer_step(optimizer: torch.optim.Optimizer) -> int:
    """The number of steps that AdamW has made."""
    return max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)


def set_moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, values: Moments, step: int) -> None:
    """Restore what `moments` returned. It converts between 8 bit and fp32; the same kind is restored exactly."""
    device = parameter.device
    if isinstance(optimizer, torch.optim.AdamW):
        values = {key: value.to(device, copy=True) for key, value in dequantised(values).items()}
        on = device if parameter.is_cuda else "cpu"  # fused AdamW reads it there
        optimizer.state[parameter] = {"step": torch.tensor(float(step), device=on), **values}
        return

    where = {id(p): (g, i) for g, group in enumerate(optimizer.param_groups) for i, p in enumerate(group["params"])}
    group, index = where[id(parameter)]
    own = optimizer.param_groups[group]
    optimizer.init_state(own, parameter, group, index)  # type: ignore[attr-defined]  # bitsandbytes
    state = optimizer.state[parameter]
    state["step"] = step
    if "absmax1" not in state:
        values = dict(zip(CODES, dequantised(values).values(), strict=False))
    elif "exp_avg" in values:
        values = _quantised(values, state)
    for key, value in values.items():
        state[key].copy_(value)


def dequantised(values: Moments) -> Moments:
    """The moments in fp32, whichever way they are kept."""
    if "exp_avg" in values:
        return values
    import bitsandbytes.functional as F

    def full(code: str, absmax: str, signed: bool) -> torch.Tensor:
        return F.dequantize_blockwise(
            values[code],
            absmax=values[absmax],
            code=F.create_dynamic_map(signed=signed).to(values[code].device),
            blocksize=BLOCK,
        )

    return {"exp_avg": full("state1", "absmax1", True), "exp_avg_sq": full("state2", "absmax2", False)}


def _quantised(values: Moments, state: Moments) -> Moments:
    """fp32 moments as 8-bit codes, by the code tables of a bitsandbytes `state`."""
    import bitsandbytes.functional as F

    found: Moments = {}
    for n, name in enumerate(FP32, start=1):
        codes, quantisation = F.quantize_blockwise(
            values[name].to(state[f"qmap{n}"].device), code=state[f"qmap{n}"], blocksize=BLOCK
        )
        found |= {f"state{n}": codes, f"absmax{n}": quantisation.absmax}
    return found
