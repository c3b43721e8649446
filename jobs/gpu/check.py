"""A check of a GPU: what it asks, what it needs, and what it found.

In: the machine. Out: an Outcome for each check, with figures and a verdict: passed, failed, or skipped for a reason.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

import torch

Figures = dict[str, Any]


class UnexpectedFigureError(Exception):
    """A figure is not what it should be. `figures`: all that was found."""

    def __init__(self, message: str, figures: Figures):
        super().__init__(message)
        self.figures = figures


@dataclass(frozen=True)
class Machine:
    """What the checks run on. Without a GPU `gpus` is 0."""

    gpus: int
    name: str = "no GPU"
    capability: tuple[int, int] = (0, 0)
    memory_gib: float = 0.0
    bf16: bool = False
    why_not: str = ""  # no GPU

    @classmethod
    def here(cls) -> "Machine":
        """This machine; of several GPUs the first is described."""
        if not torch.cuda.is_available():
            built = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, and finds no GPU"
            return cls(0, why_not=built if torch.version.cuda else f"torch {torch.__version__} is built without CUDA")
        properties = torch.cuda.get_device_properties(0)
        return cls(
            torch.cuda.device_count(),
            properties.name,
            (properties.major, properties.minor),
            properties.total_memory / 2**30,
            torch.cuda.is_bf16_supported(including_emulation=False),
        )


@dataclass(frozen=True)
class Needs:
    """What a check needs of the machine."""

    gpus: int = 1
    capability: tuple[int, int] = (0, 0)
    memory_gib: float = 0.0
    bf16: bool = False
    packages: tuple[str, ...] = ()

    def missing(self, machine: Machine) -> str:
        """Why the check cannot run there; empty: it can."""
        if not machine.gpus:
            return f"no GPU: {machine.why_not}"
        if machine.gpus < self.gpus:
            return f"{self.gpus} GPUs are needed, found {machine.gpus}"
        if machine.capability < self.capability:
            wanted, found = (".".join(map(str, each)) for each in (self.capability, machine.capability))
            return f"compute capability {wanted} is needed, found {found} ({machine.name})"
        if machine.memory_gib < self.memory_gib:
            return f"{self.memory_gib:g} GiB of GPU memory are needed, found {machine.memory_gib:.1f}"
        if self.bf16 and not machine.bf16:
            return f"{machine.name} has no bf16 units"
        absent = [package for package in self.packages if find_spec(package) is None]
        return f"{', '.join(absent)} is not installed" if absent else ""


@dataclass(frozen=True)
class Check:
    """One question to the machine. `run` returns its figures, or raises UnexpectedFigureError."""

    name: str
    asks: str
    run: Callable[[torch.device], Figures]
    needs: Needs = Needs()


@dataclass(frozen=True)
class Section:
    """Checks that run one after another in a process of their own, for at most `seconds`."""

    name: str
    checks: tuple[Check, ...]
    seconds: int


@dataclass(frozen=True)
class Outcome:
    """What became of a check."""

    section: str
    name: str
    asks: str
    verdict: Literal["passed", "failed", "skipped"]
    reason: str = ""  # of a failed or skipped check
    figures: Figures = field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The fields, for the JSON file."""
        return asdict(self)


def expect(holds: bool, message: str, figures: Figures) -> Figures:
    """The figures of a check. Raises UnexpectedFigureError with `message` unless `holds`."""
    if not holds:
        raise UnexpectedFigureError(message, figures)
    return figures


def skipped(section: Section, machine: Machine) -> Iterator[Outcome]:
    """The checks of a section that cannot run on the machine."""
    for check in section.checks:
        if reason := check.needs.missing(machine):
            yield Outcome(section.name, check.name, check.asks, "skipped", reason)
