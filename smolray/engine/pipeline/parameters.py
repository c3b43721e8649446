"""A model of which this process holds a part: the other parameters are on the meta device, under their own names.

In: a transformers model (or a PeftModel) and a Split. Out: one Slot a parameter, by which weights are dropped and put
back. All stages see the same slots in the same order, so they can broadcast over them.
"""

from dataclasses import dataclass

import torch
from torch import nn

from smolray.engine.pipeline.split import Split


@dataclass(frozen=True)
class ParameterPlacement:
    """A parameter, wherever the model holds it: two references where embedding and head are tied.

    `stages`: who owns it.
    """

    name: str
    references: tuple[tuple[nn.Module, str], ...]
    stages: tuple[int, ...]

    @property
    def parameter(self) -> nn.Parameter:
        module, leaf = self.references[0]
        return getattr(module, leaf)

    @property
    def plain(self) -> bool:
        """Quantised weights are tensors of their own kind, which cannot be dropped and put back by name."""
        return type(self.parameter) is nn.Parameter

    def put(self, value: torch.Tensor) -> None:
        """Replace the parameter's tensor; whether it trains stays as it was."""
        parameter = nn.Parameter(value, requires_grad=self.parameter.requires_grad)
        for module, leaf in self.references:
            setattr(module, leaf, parameter)

    def drop(self) -> None:
        self.put(torch.empty_like(self.parameter, device="meta"))


def placements_of(model: nn.Module, split: Split) -> list[ParameterPlacement]:
    """The parameters of a model in its own order, tied ones once."""
    references: dict[int, list[tuple[nn.Module, str]]] = {}
    names: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                references.setdefault(id(parameter), []).append((module, leaf))
                names.setdefault(id(parameter), []).append(f"{prefix}.{leaf}")
    return [
        ParameterPlacement(names[key][0], tuple(references[key]), split.owners(tuple(names[key]))) for key in references
    ]
