"""Optimizers and learning-rate schedules. Neither depends on the number of workers: the rate is a function of the step.

In: parameters by name and OptimizerConfig. Out: an optimizer whose parameter groups carry the scale of their learning
rate, and what it keeps by parameter: Adam's moments in fp32, 8-bit codes with the largest value of each block of 256,
as bitsandbytes has them, or the state of another optimizer.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from smolray.config import OptimizerConfig
from smolray.model.load import group_of
from smolray.run.state import Moments, StateMismatchError

FP32 = ("exp_avg", "exp_avg_sq")
CODES = ("state1", "state2", "absmax1", "absmax2")  # bitsandbytes' names
# their moments stay fp32 under 8-bit Adam, as in transformers' Trainer
EMBEDDINGS = ("embed_tokens.weight", "position_embedding.weight")
BLOCK = 256


# bitsandbytes' class of each optimizer. Its bits are set for each group of parameters.
BITSANDBYTES = {
    "adamw_8bit": "AdamW8bit",
    "paged_adamw": "PagedAdamW8bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
    "lion": "Lion8bit",
    "lion_8bit": "Lion8bit",
    "paged_lion_8bit": "PagedLion8bit",
}


def build_optimizer(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of a run over some of its parameters.

    Biases and norms are not decayed, as in transformers' Trainer. Each parameter group has an `lr_scale`: see
    `set_learning_rate`.
    """
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        rate = config.learning_rates.get(group_of(name), config.learning_rate)
        rate *= config.loraplus_lr_ratio if "lora_B" in name else 1.0
        decay = config.weight_decay if parameter.ndim >= 2 else 0.0
        groups.setdefault((rate, decay, _is_special(name, parameter, config.name)), []).append(parameter)

    settings = [
        {
            "params": members,
            "lr": rate,
            "lr_scale": rate / config.learning_rate if config.learning_rate else 1.0,
            "weight_decay": decay,
            "special": special,
        }
        for (rate, decay, special), members in groups.items()
    ]
    adam: Any = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "fused": True,
    }
    if config.name == "adamw":
        return torch.optim.AdamW(settings, **adam)
    if config.name == "adafactor":
        return torch.optim.Adafactor(settings, lr=config.learning_rate)
    if config.name == "muon":
        return _muon(settings, adam)
    return _bitsandbytes(settings, config)


def _is_special(name: str, parameter: nn.Parameter, optimizer: str) -> bool:
    """Whether a parameter is not treated as the optimizer's name says: in 32 bit, or by AdamW."""
    if optimizer == "muon":
        return parameter.ndim != 2 or name.endswith((*EMBEDDINGS, "lm_head.weight"))
    return "8bit" in optimizer and name.endswith(EMBEDDINGS)


def _muon(settings: list[dict[str, Any]], adam: dict[str, Any]) -> torch.optim.Optimizer:
    """Muon for the matrices, AdamW for the rest."""
    matrices, rest = ([group for group in settings if group["special"] == special] for special in (False, True))
    muon = [torch.optim.Muon(matrices, lr=adam["lr"], adjust_lr_fn="match_rms_adamw")] if matrices else []
    return Together([*muon, *([torch.optim.AdamW(rest, **adam)] if rest else [])])


class Together(torch.optim.Optimizer):
    """Several optimizers as one. They share its parameter groups and its state."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]):
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        for part in parts:
            part.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of each."""
        for part in self.parts:
            part.step()


def _bitsandbytes(settings: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """One of bitsandbytes' optimizers, with 8 bit or 32 for each group."""
    import bitsandbytes as bnb

    kind: Any = getattr(bnb.optim, BITSANDBYTES[config.name])
    bits = 8 if "8bit" in config.name else 32

    class BitsByGroup(kind):
        """bitsandbytes' own setting, GlobalOptimManager, goes by id(parameter) for the whole process."""

        def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
            settings: dict[str, Any] = super().get_config(gindex, pindex, group)
            return settings | {"optim_bits": 32 if group["special"] else bits}

    epsilon = {} if "lion" in config.name else {"eps": config.adam_epsilon}
    betas = (config.adam_beta1, config.adam_beta2)
    return BitsByGroup(settings, lr=config.learning_rate, betas=betas, **epsilon)  # type: ignore[no-any-return]


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of the schedule. A group of optimizer.learning_rates follows it in proportion."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]


def schedule(config: OptimizerConfig, total_steps: int) -> Callable[[int], float]:
    """The learning rate as a function of the optimizer step (0, 1, …): transformers' schedule."""
    from transformers import get_scheduler  # its module loads PEFT: 1.4 s

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
    """What the optimizer keeps of a parameter beside the number of its steps; zeros before the first step.

    FP32 where these are AdamW's moments in 32 bit, CODES where they are kept in 8 bit, else under the optimizer's own
    names.
    """
    state = optimizer.state.get(parameter, {})
    if "absmax1" in state:
        return {key: state[key] for key in CODES if key in state}
    return {key: state.get(name, empty) for key, (name, empty) in _kept(optimizer, parameter).items()}


def _kept(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, tuple[str, torch.Tensor]]:
    """Our key -> the optimizer's, and zeros of its shape, of all that is kept in 32 bit."""
    zeros = torch.zeros_like(parameter, dtype=torch.float32)
    if isinstance(optimizer, Together) and "ns_steps" in _place(optimizer, parameter)[0]:
        return {"momentum_buffer": ("momentum_buffer", zeros)}
    if isinstance(optimizer, torch.optim.AdamW | Together):
        return {name: (name, zeros) for name in FP32}
    if isinstance(optimizer, torch.optim.Adafactor):
        if parameter.ndim < 2:
            return {"variance": ("variance", zeros)}
        return {"row_var": ("row_var", zeros[..., :1]), "col_var": ("col_var", zeros[..., :1, :])}
    if "lion" in optimizer.optimizer_name:  # type: ignore[attr-defined]
        return {"state1": ("state1", zeros)}
    return {key: (name, zeros) for key, name in zip(FP32, CODES[:2], strict=True)}


def _place(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> tuple[dict[str, Any], int, int]:
    """The group of a parameter, the number of the group, and the parameter's number in it."""
    return next(
        (group, g, i)
        for g, group in enumerate(optimizer.param_groups)
        for i, p in enumerate(group["params"])
        if p is parameter
    )


def optimizer_step(optimizer: torch.optim.Optimizer) -> int:
    """The number of steps that the optimizer has made, as far as it counts them (Muon does not)."""
    return max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)


def set_moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, values: Moments, step: int) -> None:
    """Restore what `moments` returned. It converts between 8 bit and fp32; the same kind is restored exactly.

    Raises StateMismatchError where the values are those of another optimizer.
    """
    device, wanted = parameter.device, _kept(optimizer, parameter)
    full = dequantised(values)
    if full.keys() != wanted.keys():
        raise StateMismatchError(
            f"the checkpoint has {', '.join(values)} of the optimizer's state, expected {', '.join(wanted)}: "
            "optimizer.name has changed; continue with the one that it was saved with, or under another name"
        )
    if type(optimizer).__module__.startswith("torch") or isinstance(optimizer, Together):
        on = device if parameter.is_cuda and "exp_avg" in wanted else "cpu"  # fused AdamW reads it there
        counted = {} if "momentum_buffer" in wanted else {"step": torch.tensor(float(step), device=on)}
        optimizer.state[parameter] = counted | {key: value.to(device, copy=True) for key, value in full.items()}
        return

    own, group, index = _place(optimizer, parameter)
    optimizer.init_state(own, parameter, group, index)  # type: ignore[attr-defined]  # bitsandbytes
    state = optimizer.state[parameter]
    state["step"] = step
    if "absmax1" not in state:
        values = {wanted[key][0]: value for key, value in full.items()}
    elif "absmax1" not in values:
        values = _quantised(full, state)
    for key, value in values.items():
        state[key].copy_(value)


def dequantised(values: Moments) -> Moments:
    """The moments in fp32, whichever way they are kept."""
    if "absmax1" not in values:
        return values
    import bitsandbytes.functional as F

    def full(number: int) -> torch.Tensor:
        codes = values[f"state{number}"]
        return F.dequantize_blockwise(
            codes,
            absmax=values[f"absmax{number}"],
            code=F.create_dynamic_map(signed=number == 1).to(codes.device),
            blocksize=BLOCK,
        )

    return {name: full(number) for number, name in enumerate(FP32, 1)} if "state2" in values else {"state1": full(1)}


def _quantised(values: Moments, state: Moments) -> Moments:
    """fp32 moments as 8-bit codes, by the code tables of a bitsandbytes `state`."""
    import bitsandbytes.functional as F

    found: Moments = {}
    for n, value in enumerate(values.values(), start=1):
        codes, quantisation = F.quantize_blockwise(
            value.to(state[f"qmap{n}"].device), code=state[f"qmap{n}"], blocksize=BLOCK
        )
        found |= {f"state{n}": codes, f"absmax{n}": quantisation.absmax}
    return found
