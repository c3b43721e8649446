"""Bytes on a card: weights, gradients, optimizer state, activations, buffers.

In: shape, training, the largest micro-batch and how the model is cut. Out: Memory for one card of a data-parallel run, or a table of bytes for
every contiguous piece of the model as a pipeline stage.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from smolray.planner import assumptions as a
from smolray.planner.activations import Gradients, Kept, gradients, kept_bytes, weight_workspace
from smolray.planner.shapes import ModelShape, Training
from smolray.planner.statistics import Load


@dataclass(frozen=True)
class Memory:
    """Bytes on one card at its fullest: either in the backward pass, with `activations`, or in the optimizer step, with `step`."""

    weights: float
    gradients: float
    optimizer: float
    activations: float  # logits included
    step: float  # gradient buckets, fp32 copies
    workspace: float  # context, communication, unpacked quantised weights, fragmentation

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + max(self.activations, self.step) + self.workspace

    @property
    def largest(self) -> str:
        """The name of the part that takes most."""
        parts = {**asdict(self), "activations" if self.step > self.activations else "step": 0.0}
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True)
class Zero:
    """A data-parallel run under DeepSpeed; `world` 1 is the single card. Stage 0 keeps trained weights in fp32."""

    stage: int
    world: int
    offload_optimizer: bool = False
    offload_param: bool = False


@dataclass(frozen=True)
class Work:
    """A model, what of it is trained, how, and what autograd keeps of one micro-batch."""

    shape: ModelShape
    training: Training
    load: Load
    checkpointing: bool | int
    optimizer: str = "adamw"
    reference_copy: bool = False  # DPO with a frozen copy of the model
    precomputed: bool = False  # vision features are read, the tower does not run

    @property
    def gradients(self) -> tuple[Gradients, ...]:
        return gradients(self.shape, self.training)

    def kept(self) -> tuple[Kept, ...]:
        """Of every unit, checkpointing applied: a checkpointed layer keeps its entry, and the rest only while it runs again."""
        found = []
        for unit, gradient in zip(self.shape.units, self.gradients, strict=True):
            if self.precomputed and unit.kind in ("vision_embeddings", "vision"):
                found.append(Kept(0.0, 0.0, 0.0))
                continue
            kept = kept_bytes(self.shape, unit, self.training, gradient, self.load)
            found.append(Kept(kept.entry, kept.entry, kept.saved + kept.transient) if self.checkpoints(unit.name) else kept)
        return tuple(found)

    def checkpoints(self, unit: str) -> bool:
        """Whether a unit is checkpointed: every layer, or the first so many of the tower and of the text model."""
        kind, _, number = unit.partition(".")
        if kind not in ("vision", "text") or not number or not self.checkpointing:
            return False
        return self.checkpointing is True or int(number) < self.checkpointing

    def moments(self) -> float:
        return a.ADAM_8BIT_MOMENTS if "8bit" in self.optimizer else a.ADAM_MOMENTS


def zero_memory(work: Work, zero: Zero) -> Memory:
    """On one card of a data-parallel run. Gradients stay whole until the step's one reduction, whatever the stage (engine/zero.py)."""
    shape, training, world = work.shape, work.training, zero.world
    size, trained = training.bytes, sum(training.trained_parameters(unit) for unit in shape.units)
    whole = sum(training.weight_bytes(unit) for unit in shape.units)
    if work.reference_copy:
        whole += shape.parameters * size
    kept = work.kept()
    activations = sum(k.saved for k in kept) + max(k.transient for k in kept)
    share = 0.0 if zero.offload_optimizer else trained / world
    if zero.stage == 0:
        weights = whole + trained * (4 - size)
        memory = (weights, trained * 4.0, trained * work.moments(), activations, 0.0)
    elif zero.stage < 3:
        flush = a.REDUCE_BUCKET * size + share * size
        update = share * 2 * size + (share * 4 if size < 4 else 0)
        memory = (whole, trained * size, share * (a.MASTER + work.moments()), activations, max(flush, update))
    else:
        gathered = min(whole, a.LIVE_PARAMETERS * float(size))
        weights = gathered + (0.0 if zero.offload_param else whole / world)
        buffers = trained * size / world + share * (4 if size < 4 else 0)
        memory = (weights + a.REDUCE_BUCKET * size, trained * size, share * (a.MASTER + work.moments()), activations, buffers)
    return Memory(*memory, _workspace(work, sum(memory[:3]) + max(memory[3:]), world > 1))


def pipeline_memory(work: Work, in_flight: Sequence[int], micro_batches: int) -> np.ndarray:
    """(stages, units + 1, units + 1) bytes of stage p when it holds units[start:end]; `in_flight`: micro-batches it keeps at once.

    torch.distributed.pipelining allocates the buffers that receive activations and gradients for every micro-batch of a step.
    """
    shape, training, units = work.shape, work.training, work.shape.units
    trained = [training.trained_parameters(u) for u in units]
    master = a.MASTER if training.bytes < 4 else 0.0
    each = a.PIPELINE_GRADIENT + master + work.moments()
    static = [training.weight_bytes(u) + n * each for u, n in zip(units, trained, strict=True)]
    if work.reference_copy:
        static = [s + u.parameters * training.bytes for s, u in zip(static, units, strict=True)]
    kept = work.kept()
    crossing = boundary_bytes(work)
    number = len(units)
    saved, states = _ranges([k.saved for k in kept]), _ranges(static)
    transient = np.zeros((number + 1, number + 1))
    for start in range(number):
        transient[start, start + 1 :] = np.maximum.accumulate([k.transient for k in kept[start:]])
    received = crossing[:, None] + np.where(np.arange(number + 1) < number, crossing * _returns(work), 0.0)[None, :]
    tied = np.zeros_like(states)
    if shape.tied:  # the head without the embeddings beside it holds its own copy of the table
        table = shape.text.vocab * shape.text.hidden * (training.bytes + (each if "text" in training.full else 0))
        merge = next(i for i, u in enumerate(units) if u.kind == "merge")
        tied[merge + 1 :, number] = table
    fixed = states + tied + transient + received * micro_batches
    stages = [fixed + flying * (saved + crossing[None, :]) for flying in in_flight]
    return np.stack([_workspace_array(work, stage) for stage in stages])


def stage_memory(work: Work, start: int, end: int, flying: int, micro_batches: int) -> Memory:
    """One stage's bytes by part; their total is the table's entry."""
    total = float(pipeline_memory(work, [flying], micro_batches)[0, start, end])
    units = work.shape.units[start:end]
    trained = sum(work.training.trained_parameters(u) for u in units)
    master = a.MASTER if work.training.bytes < 4 else 0.0
    weights = sum(work.training.weight_bytes(u) for u in units)
    states = (weights, trained * a.PIPELINE_GRADIENT, trained * (master + work.moments()))
    workspace = total - (total - a.CUDA_CONTEXT - a.NCCL_BUFFERS - weight_workspace(work.shape, work.training)) / (1 + a.FRAGMENTATION)
    return Memory(*states, total - sum(states) - workspace, 0.0, workspace)


def boundary_bytes(work: Work) -> np.ndarray:
    """(units + 1,) bytes of what a micro-batch sends across the boundary before each unit; 0 at both ends of the model."""
    shape, size, load = work.shape, work.training.bytes, work.load
    vision = 0.0 if work.precomputed else load.tiles * shape.vision.patches * shape.vision.hidden * size
    text = load.tokens * shape.text.hidden * float(size)
    inside = [vision if u.kind in ("vision", "merge") else text for u in shape.units[1:]]
    return np.array([0.0, *inside, 0.0])


def _returns(work: Work) -> np.ndarray:
    """(units + 1,) whether a gradient comes back across the boundary before each unit."""
    return np.array([*(1.0 if g.input else 0.0 for g in work.gradients), 0.0])


def _ranges(values: Sequence[float]) -> np.ndarray:
    """[start, end] -> the sum of values[start:end]."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return sums[None, :] - sums[:, None]


def _workspace(work: Work, used: float, several: bool) -> float:
    return a.CUDA_CONTEXT + (a.NCCL_BUFFERS if several else 0.0) + weight_workspace(work.shape, work.training) + a.FRAGMENTATION * used


def _workspace_array(work: Work, used: np.ndarray) -> np.ndarray:
    return used * (1 + a.FRAGMENTATION) + a.CUDA_CONTEXT + a.NCCL_BUFFERS + weight_workspace(work.shape, work.training)
