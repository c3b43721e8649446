"""Which stage owns which parameter. A process holds its own; the others are on the meta device, under their own names.

In: a transformers model (or a PeftModel) and a Split. Out: a ParameterPlacement for each parameter, by which weights
are dropped and put back. All stages see the same placements in the same order, so they can broadcast over them.
"""

from dataclasses import dataclass

import torch
from torch import nn

from smolray.engine.pipeline.split import Split


@dataclass(frozen=True)
class ParameterPlacement:
    """Where a parameter is.

    Attributes:
        name: its Hugging Face name, the first where it has two.
        references: (module, attribute) that hold it: two where embedding and head are tied.
        stages: the stages that own it.
    """

    name: str
    references: tuple[tuple[nn.Module, str], ...]
    stages: tuple[int, ...]

    @property
    def parameter(self) -> nn.Parameter:
        module, attribute = self.references[0]
        return getattr(module, attribute)

    @property
    def plain(self) -> bool:
        """Whether it can be dropped and put back by name. Quantised weights, tensors of their own kind, cannot."""
        return type(self.parameter) is nn.Parameter

    def put(self, value: torch.Tensor) -> None:
        """Replace the parameter's tensor; it stays trained or frozen."""
        parameter = nn.Parameter(value, requires_grad=self.parameter.requires_grad)
        for module, attribute in self.references:
            setattr(module, attribute, parameter)

    def drop(self) -> None:
        """Free the parameter's memory: it keeps its shape on the meta device."""
        self.put(torch.empty_like(self.parameter, device="meta"))


def placements_of(model: nn.Module, split: Split) -> list[ParameterPlacement]:
    """The parameters of a model in its own order, tied ones once."""
    references: dict[int, list[tuple[nn.Module, str]]] = {}
    names: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                references.setdefault(id(parameter), []).append((module, attribute))
                names.setdefault(id(parameter), []).append(f"{prefix}.{attribute}")
    return [
        ParameterPlacement(names[key][0], tuple(references[key]), split.owners(tuple(names[key]))) for key in references
    ]
