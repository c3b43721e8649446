"""What an engine hands over at a checkpoint: weights and optimizer moments by Hugging Face name, on the CPU.

In: the parameters of any engine on any number of workers. Out: an EngineState, and weights copied back into parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

Moments = dict[str, torch.Tensor]


@dataclass
class EngineState:
    """Tensors on the CPU by Hugging Face parameter name, free of world size and engine. Filled on rank 0 only.

    Weights and moments are fp32. A parameter whose moments are kept in 8 bit, or that has the state of another
    optimizer than AdamW, has these in `codes` instead (engine/optim.py).
    """

    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    exp_avg: dict[str, torch.Tensor] = field(default_factory=dict)
    exp_avg_sq: dict[str, torch.Tensor] = field(default_factory=dict)
    codes: dict[str, Moments] = field(default_factory=dict)
    optimizer_step: int = 0
    loss_scale: float | None = None

    def put(self, name: str, weight: torch.Tensor, moments: Moments) -> None:
        """Copy what an engine holds of one parameter."""
        self.weights[name] = weight.detach().to("cpu", torch.float32, copy=True)
        copied = {key: value.detach().to("cpu", copy=True) for key, value in moments.items()}
        if copied.keys() == {"exp_avg", "exp_avg_sq"}:
            self.exp_avg[name], self.exp_avg_sq[name] = copied["exp_avg"].float(), copied["exp_avg_sq"].float()
        else:
            self.codes[name] = copied

    def moments(self, name: str) -> Moments:
        """Adam's moments of one parameter, as they were kept. Raises StateMismatchError where they were not."""
        if name in self.codes:
            return self.codes[name]
        if name not in self.exp_avg:
            raise StateMismatchError(
                f"the checkpoint has the weights of {name} and no optimizer state: engine = trl keeps none; "
                "continue with engine=trl, or under another name"
            )
        return {"exp_avg": self.exp_avg[name], "exp_avg_sq": self.exp_avg_sq[name]}


def canonical_name(name: str, adapter: str = "default") -> str:
    """The Hugging Face name of a parameter, without what PEFT puts around it. `adapter`: PEFT's name of the adapter."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(f".{adapter}.", ".")


class StateMismatchError(ValueError):
    """A checkpoint's weights do not fit the run's parameters; the message says which."""


def load_weights(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, torch.Tensor]) -> None:
    """Copy a checkpoint's weights into parameters of the same canonical names.

    Raises StateMismatchError where names or shapes differ.
    """
    if lost := sorted(parameters.keys() ^ weights.keys()):
        named = f"{len(lost)}: {', '.join(lost[:3])} …"
        raise StateMismatchError(
            f"the checkpoint and the run train different parameters ({named}): model.train or lora has changed"
        )

    for name, parameter in parameters.items():
        if weights[name].numel() != (numel := getattr(parameter, "ds_numel", parameter.numel())):
            raise StateMismatchError(
                f"{name} has {numel} values in the run and {weights[name].numel()} in the checkpoint: "
                "lora.r or the model has changed"
            )

    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name].to(parameter.device))
