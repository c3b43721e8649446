"""Bytes on a GPU: weights, gradients, optimizer state, activations, buffers.

In: a Workload of the largest micro-batch, and how the model is distributed. Out: the Memory of one GPU of a
data-parallel run, or a table with the bytes of every contiguous range of layers as a stage of a pipeline.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from smolray.planner import assumptions as a
from smolray.planner.activations import Gradients, Kept, gradients, kept_bytes, weight_workspace
from smolray.planner.shapes import ModelShape, Training
from smolray.planner.statistics import Load

Rest = ParamSpec("Rest")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at its fullest.

    That is in the backward pass, with `activations`, in the optimizer step, with `step`, or in an evaluation.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float  # logits included
    step: float  # gradient buckets, fp32 copies
    workspace: float  # context, communication, unpacked quantised weights, fragmentation
    evaluation: float = 0.0  # weights of other GPUs, and the longest prompt

    @property
    def kept(self) -> float:
        """What is there all the time."""
        return self.weights + self.gradients + self.optimizer + self.workspace

    @property
    def total(self) -> float:
        return self.kept + max(self.activations, self.step, self.evaluation)

    @property
    def tensors(self) -> float:
        """What torch.cuda.max_memory_allocated shows of training: no context, nothing that the allocator wastes."""
        return self.kept - self.workspace + max(self.activations, self.step)

    @property
    def largest(self) -> str:
        """The name of the largest part."""
        parts = asdict(self)
        fullest = max(("activations", "step", "evaluation"), key=lambda name: parts[name])
        return max(("weights", "gradients", "optimizer", fullest, "workspace"), key=lambda name: parts[name])


@dataclass(frozen=True)
class Zero:
    """A data-parallel run under DeepSpeed. `world` 1: a single GPU. Stage 0 keeps fp32 copies of trained weights."""

    stage: int
    world: int
    offload_optimizer: bool = False
    offload_param: bool = False


@dataclass(frozen=True)
class Workload:
    """A model, what of it is trained and how, and one micro-batch of data."""

    shape: ModelShape
    training: Training
    load: Load
    checkpointing: bool | int
    optimizer: str = "adamw"
    reference_copy: bool = False  # DPO with a frozen copy of the model
    reference_pass: bool = False  # DPO that runs a reference model for every micro-batch
    first_pass: bool = False  # retrieval: every layer runs once without gradients before (objectives/contrastive.py)
    prompt: float = 0.0  # bytes to decode the longest prompt in an evaluation (planner/decoding.py)
    context: float = a.CUDA_CONTEXT  # of the GPU with the largest
    fragmentation: float = a.FRAGMENTATION

    @cached_property
    def gradients(self) -> tuple[Gradients, ...]:
        return gradients(self.shape, self.training)

    @cached_property
    def trained(self) -> tuple[int, ...]:
        """Trained parameters of every layer."""
        return tuple(self.training.trained_parameters(layer) for layer in self.shape.layers)

    @cached_property
    def trained_parameters(self) -> int:
        """Trained parameters of the whole model."""
        return sum(self.trained)

    @cached_property
    def weights(self) -> tuple[float, ...]:
        """Bytes of every layer's weights."""
        return tuple(self.training.weight_bytes(layer) for layer in self.shape.layers)

    @cached_property
    def weight_bytes(self) -> float:
        """Bytes of all weights."""
        return sum(self.weights)

    @cached_property
    def frozen_groups(self) -> float:
        """Bytes of the model groups in which nothing is trained: ZeRO-3 keeps them whole (engine/zero.py)."""
        lora = self.training.lora.trained if self.training.lora else set()
        frozen = {"vision", "connector", "text"} - self.training.full - lora
        parameters = sum(n for layer in self.shape.layers for g, n in layer.by_group.items() if g in frozen)
        return parameters * float(self.training.bytes)

    @cached_property
    def memo(self) -> dict[tuple[object, ...], Any]:
        """What functions of this workload returned (per_workload)."""
        return {}

    @cached_property
    def kept(self) -> tuple[Kept, ...]:
        """What autograd keeps of every layer.

        A checkpointed layer keeps its input; the rest only while it runs again.
        """
        known: dict[tuple[str, Gradients, bool], Kept] = {}  # layers of one kind are alike, except the last text layer
        found = []
        for layer, gradient in zip(self.shape.layers, self.gradients, strict=True):
            key = (layer.kind, gradient, layer.name == self.shape.last_text_layer)
            if key not in known:
                known[key] = kept_bytes(self.shape, layer, self.training, gradient, self.load)
            kept = known[key]
            if self.checkpoints(layer.name):
                kept = Kept(kept.entry, kept.entry, kept.saved + kept.transient)
            found.append(kept)
        return tuple(found)

    def checkpoints(self, layer: str) -> bool:
        """Whether a layer is checkpointed.

        Of the tower's and the text model's layers: all but the last text layer, or the first `checkpointing` of each.
        """
        kind, _, number = layer.partition(".")
        is_tower_layer = kind in ("vision", "text") and bool(number)
        if not is_tower_layer or not self.checkpointing or layer == self.shape.last_text_layer:
            return False
        return self.checkpointing is True or int(number) < self.checkpointing

    @cached_property
    def moments(self) -> tuple[float, ...]:
        """Bytes of the optimizer's states of every layer. It treats embeddings otherwise (engine/optim.py)."""
        each, of_table = self.state_bytes
        v, full, found = self.shape.vision, self.training.full, []
        for layer, trained in zip(self.shape.layers, self.trained, strict=True):
            table = v.patches * v.hidden if layer.kind == "vision_embeddings" and "vision" in full else 0
            table = self.table if layer.kind == "merge" and "text" in full else table
            if layer.kind == "head" and self.optimizer == "muon" and "text" in full:
                table = trained  # AdamW's
            found.append(of_table * table + each * (trained - table))
        return tuple(found)

    @property
    def state_bytes(self) -> tuple[float, float]:
        """Bytes that the optimizer keeps of a parameter, and of one of the embeddings."""
        if self.optimizer == "adafactor":  # a number for each row and column: the most are kept of narrow matrices
            narrow = self.training.lora.r if self.training.lora else self.shape.text.hidden / 2
            return a.ADAM_MOMENTS / 2 / narrow, a.ADAM_MOMENTS / 2 / self.shape.text.hidden
        moments = 1 if "lion" in self.optimizer or self.optimizer == "muon" else 2
        of_table = a.ADAM_MOMENTS if self.optimizer == "muon" else a.ADAM_MOMENTS / 2 * moments
        return (a.ADAM_8BIT_MOMENTS if "8bit" in self.optimizer else a.ADAM_MOMENTS) / 2 * moments, of_table

    @property
    def table(self) -> int:
        """Parameters of the token embeddings."""
        return self.shape.text.vocab * self.shape.text.hidden


def per_workload(
    function: Callable[Concatenate[Workload, Rest], Result],
) -> Callable[Concatenate[Workload, Rest], Result]:
    """A function of a workload and hashable values that remembers its results as long as the workload lives."""

    @wraps(function)
    def remembered(work: Workload, *args: Rest.args, **named: Rest.kwargs) -> Result:
        key = (function, args, *named.items())
        if key not in work.memo:
            work.memo[key] = function(work, *args, **named)
        return work.memo[key]  # type: ignore[no-any-return]

    return remembered


@per_workload
def activation_peak(work: Workload, several: bool, gradient_bytes: int) -> float:
    """Bytes of activations at the fullest moment of a backward pass, on top of all gradients.

    In the backward pass of a layer, everything saved up to it exists, and what it needs while it runs. If the step has
    only one micro-batch, the gradients of the layers before it do not exist yet; with `several`, those of earlier
    micro-batches do.
    """
    saved = np.cumsum([k.saved for k in work.kept]) + [k.transient for k in work.kept]
    absent = np.concatenate([[0.0], np.cumsum(work.trained)[:-1]]) * (0 if several else gradient_bytes)
    return max(float((saved - absent).max()), 0.0)


def zero_memory(work: Workload, zero: Zero, several: bool = True) -> Memory:
    """The memory of one GPU of a data-parallel run.

    Gradients stay whole until the one reduction of the step, on every stage (engine/zero.py).

    Args:
        work: the largest micro-batch.
        zero: the stage and what it offloads.
        several: the GPU has more than one micro-batch in a step.
    """
    training, world = work.training, zero.world
    size, trained, whole = training.trained_bytes, work.trained_parameters, work.weight_bytes
    moments = sum(work.moments)
    copy = work.shape.parameters * training.bytes if work.reference_copy else 0
    activations = activation_peak(work, several, size)
    if several and size < 4:  # 16-bit gradients are added in fp32 (engine/gradients.py)
        activations += trained * (4.0 if zero.stage == 3 else 4.0 - size)
    share, evaluation = 0.0 if zero.offload_optimizer else 1 / world, work.prompt
    optimizer = share * (a.MASTER * trained + moments)

    if zero.stage == 0:
        # 16-bit weights and gradients with fp32 copies: the gradients' are made in the step, in their place
        masters = a.MASTER * trained if size < 4 else 0.0
        buffer = min(a.REDUCE_BUCKET, trained) * size if world > 1 else 0
        converted = max(trained * (4.0 - size), float(buffer))
        memory = (whole + copy, trained * float(size), masters + moments, activations, converted)
    elif zero.stage < 3:
        flush = min(a.REDUCE_BUCKET, trained) * size + share * trained * size
        update = share * trained * (2 * size + (4 if size < 4 else 0))
        memory = (whole + copy, trained * size, optimizer, activations, max(flush, update))
    else:
        kept_whole = 0.0 if zero.offload_param else work.frozen_groups
        gathered = kept_whole + min(whole - kept_whole, a.LIVE_PARAMETERS * float(training.bytes))
        weights = gathered + (0.0 if zero.offload_param else whole / world) + copy
        weights += min(a.REDUCE_BUCKET, trained) * size
        buffers = trained * size / world + share * trained * (4 if size < 4 else 0)
        evaluation += whole - gathered  # it gathers all weights
        memory = (weights, trained * size, optimizer, activations, buffers)
    fullest = max(*memory[3:], evaluation)
    return Memory(*memory, _workspace(work, sum(memory[:3]) + fullest, world > 1), evaluation)


def host_bytes(work: Workload, zero: Zero) -> float:
    """Bytes of main memory that one worker needs for what it offloads."""
    optimizer = a.OFFLOADED * work.trained_parameters / zero.world if zero.offload_optimizer else 0.0
    return optimizer + (work.weight_bytes / zero.world if zero.offload_param else 0.0)


def pipeline_memory(work: Workload, in_flight: Sequence[int], micro_batches: int) -> np.ndarray:
    """Bytes of every stage for every range of layers that it may hold.

    torch.distributed.pipelining allocates the buffers that receive activations and gradients for every micro-batch of a
    step. Quantised weights cannot be dropped: every stage holds all of them. For evaluation every stage borrows the
    weights of the other stages (engine/pipeline/engine.py).

    Args:
        work: the largest micro-batch.
        in_flight: of each stage, the micro-batches whose activations it keeps at once.
        micro_batches: of the step, in one pipeline.

    Returns:
        (stages, layers + 1, layers + 1): [p, start, end] is stage p with layers[start:end].
    """
    shape, kept, crossing = work.shape, work.kept, boundary_bytes(work)
    number = len(shape.layers)
    quantised = [work.training.quantised_bytes(layer) for layer in shape.layers]
    plain = [w - q for w, q in zip(work.weights, quantised, strict=True)]
    saved, running = _ranges([k.saved for k in kept]), _running(work)
    if shape.layers[-3].kind == shape.layers[-2].kind:
        # a last text layer without the head after it runs whole, as the one before it
        for table in (saved, running):
            table[:-2, -2] += kept[-3].saved - kept[-2].saved

    states = _states(work, plain) + sum(quantised)
    returned = np.where(np.arange(number + 1) < number, crossing * _returns(work), 0.0)
    received = crossing[:, None] + returned[None, :]
    fixed = states + running + received * micro_batches
    borrowing = states + sum(plain) - _ranges(plain) + work.prompt
    stages = [np.maximum(fixed + (flying - 1) * saved + flying * crossing[None, :], borrowing) for flying in in_flight]
    return np.stack([_workspace_array(work, stage) for stage in stages])


def _states(work: Workload, plain: Sequence[float]) -> np.ndarray:
    """(layers + 1, layers + 1) bytes of weights that are not quantised, their gradients, masters and moments."""
    shape, training = work.shape, work.training
    each = a.PIPELINE_GRADIENT + (a.MASTER if training.trained_bytes < 4 else 0.0)  # of a trained parameter
    static = [w + n * each + m for w, n, m in zip(plain, work.trained, work.moments, strict=True)]
    if work.reference_copy:
        static = [s + layer.parameters * training.bytes for s, layer in zip(static, shape.layers, strict=True)]

    states = _ranges(static)
    if shape.tied:  # a head without the embeddings on its stage holds the table once more
        again = each + a.ADAM_MOMENTS if "text" in training.full else 0.0
        states[shape.merge + 1 :, len(shape.layers)] += work.table * (training.bytes + again)
    return states


def _running(work: Workload) -> np.ndarray:
    """(layers + 1, layers + 1) bytes of one micro-batch at the fullest moment of its backward pass."""
    number, kept = len(work.shape.layers), work.kept
    saved, transient = _ranges([k.saved for k in kept]), [k.transient for k in kept]
    running = np.zeros((number + 1, number + 1))
    for start in range(number):
        running[start, start + 1 :] = np.maximum.accumulate(saved[start, start + 1 :] + transient[start:])
    return running


def stage_memory(work: Workload, start: int, end: int, total: float) -> Memory:
    """The bytes of a stage with layers[start:end] by part; `total`: its entry in the table of `pipeline_memory`.

    Its activations are what is left of the total.
    """
    shape, training = work.shape, work.training
    copied = work.table if shape.tied and end == len(shape.layers) and start > shape.merge else 0
    again = copied if "text" in training.full else 0
    trained = sum(work.trained[start:end]) + again
    master = a.MASTER if training.trained_bytes < 4 else 0.0
    elsewhere = [pair for n, pair in enumerate(zip(shape.layers, work.weights, strict=True)) if not start <= n < end]
    quantised = sum(training.quantised_bytes(layer) for layer, _ in elsewhere)

    weights = sum(work.weights[start:end]) + copied * training.bytes + quantised
    optimizer = trained * master + sum(work.moments[start:end]) + again * a.ADAM_MOMENTS
    states = (weights, trained * a.PIPELINE_GRADIENT, optimizer)
    fixed = work.context + a.NCCL_BUFFERS
    workspace = total - (total - fixed - weight_workspace(shape, training)) / (1 + work.fragmentation)
    borrowed = sum(plain for _, plain in elsewhere) - quantised
    return Memory(*states, total - sum(states) - workspace, 0.0, workspace, borrowed + work.prompt)


def boundary_bytes(work: Workload) -> np.ndarray:
    """(layers + 1,) bytes that a micro-batch sends across the boundary before each layer.

    0 before the first layer and after the last one.
    """
    shape, size, load = work.shape, work.training.bytes, work.load
    vision = load.tiles * shape.vision.patches * shape.vision.hidden * float(size)
    text = load.tokens * shape.text.hidden * float(size)
    inside = [vision if layer.kind in ("vision", "merge") else text for layer in shape.layers[1:]]
    return np.array([0.0, *inside, 0.0])


def _returns(work: Workload) -> np.ndarray:
    """(layers + 1,) 1 where a gradient comes back across the boundary before a layer, else 0."""
    return np.array([*(1.0 if g.input else 0.0 for g in work.gradients), 0.0])


def _ranges(values: Sequence[float]) -> np.ndarray:
    """(n + 1, n + 1): [start, end] is the sum of values[start:end]."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return sums[None, :] - sums[:, None]


def _workspace(work: Workload, used: float, several: bool) -> float:
    """Bytes of the CUDA context, of NCCL (with `several` GPUs), of unpacked weights, and lost to fragmentation."""
    communication = a.NCCL_BUFFERS if several else 0.0
    return work.context + communication + weight_workspace(work.shape, work.training) + work.fragmentation * used


def _workspace_array(work: Workload, used: np.ndarray) -> np.ndarray:
    """`used` with the workspace of one of several GPUs added."""
    fixed = work.context + a.NCCL_BUFFERS + weight_workspace(work.shape, work.training)
    return used * (1 + work.fragmentation) + fixed
