"""Bytes on a card: weights, gradients, optimizer state, activations, buffers.

In: shape, training, the largest micro-batch and how the model is cut. Out: Memory for one card of a data-parallel run,
or a table of bytes for every contiguous piece of the model as a pipeline stage.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np

from smolray.planner import assumptions as a
from smolray.planner.activations import Gradients, Kept, gradients, kept_bytes, weight_workspace
from smolray.planner.shapes import ModelShape, Training
from smolray.planner.statistics import Load


@dataclass(frozen=True)
class Memory:
    """Bytes on one card at its fullest: either in the backward pass, with `activations`, or in the optimizer step, with
    `step`.
    """

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
class Workload:
    """A model, what of it is trained, how, and what autograd keeps of one micro-batch."""

    shape: ModelShape
    training: Training
    load: Load
    checkpointing: bool | int
    optimizer: str = "adamw"
    reference_copy: bool = False  # DPO with a frozen copy of the model
    reference_pass: bool = False  # DPO that asks a reference model for every micro-batch
    first_pass: bool = False  # retrieval: everything runs once more, without gradients, before (contrastive.py)

    @cached_property
    def gradients(self) -> tuple[Gradients, ...]:
        return gradients(self.shape, self.training)

    @cached_property
    def trained(self) -> tuple[int, ...]:
        """Trained parameters of every layer."""
        return tuple(self.training.trained_parameters(layer) for layer in self.shape.layers)

    @cached_property
    def weights(self) -> tuple[float, ...]:
        """Bytes of every layer's weights."""
        return tuple(self.training.weight_bytes(layer) for layer in self.shape.layers)

    @cached_property
    def frozen_groups(self) -> float:
        """Bytes of the groups in which nothing trains: ZeRO-3 keeps them whole (engine/zero.py)."""
        lora = self.training.lora.groups if self.training.lora else ()
        frozen = {"vision", "connector", "text"} - self.training.full - set(lora)
        return sum(n for u in self.shape.layers for g, n in u.by_group.items() if g in frozen) * float(
            self.training.bytes
        )

    @cached_property
    def seconds(self) -> dict[object, list[tuple[float, float]]]:
        """Filled by time.layer_table: what was worked out once for a card."""
        return {}

    @cached_property
    def whole_seconds(self) -> dict[object, float]:
        """Filled by time.micro_batch_seconds."""
        return {}

    @cached_property
    def kept(self) -> tuple[Kept, ...]:
        """Of every layer, checkpointing applied: a checkpointed layer keeps its entry, and the rest only while it runs
        again.
        """
        known: dict[tuple[str, Gradients, bool], Kept] = {}  # layers of one kind are alike, but for the last
        found = []
        for layer, gradient in zip(self.shape.layers, self.gradients, strict=True):
            key = (layer.kind, gradient, layer.name == self.shape.last_text_layer)
            if (kept := known.get(key)) is None:
                kept = known[key] = kept_bytes(self.shape, layer, self.training, gradient, self.load)
            found.append(
                Kept(kept.entry, kept.entry, kept.saved + kept.transient) if self.checkpoints(layer.name) else kept
            )
        return tuple(found)

    def checkpoints(self, layer: str) -> bool:
        """Whether a layer is checkpointed: every layer but the text model's last, or the first so many of the tower and
        of the text model.
        """
        kind, _, number = layer.partition(".")
        if (
            kind not in ("vision", "text")
            or not number
            or not self.checkpointing
            or layer == self.shape.last_text_layer
        ):
            return False
        return self.checkpointing is True or int(number) < self.checkpointing

    @cached_property
    def moments(self) -> tuple[float, ...]:
        """Bytes of Adam's two moments of every layer. Under 8-bit Adam those of embeddings stay fp32 (optim.py)."""
        if "8bit" not in self.optimizer:
            return tuple(a.ADAM_MOMENTS * n for n in self.trained)
        v, full, found = self.shape.vision, self.training.full, []
        for layer, trained in zip(self.shape.layers, self.trained, strict=True):
            table = v.patches * v.hidden if layer.kind == "vision_embeddings" and "vision" in full else 0
            table = self.table if layer.kind == "merge" and "text" in full else table
            found.append(a.ADAM_MOMENTS * table + a.ADAM_8BIT_MOMENTS * (trained - table))
        return tuple(found)

    @property
    def table(self) -> int:
        """Parameters of the token embeddings."""
        return self.shape.text.vocab * self.shape.text.hidden


def activation_peak(work: Workload, several: bool, gradient_bytes: int) -> float:
    """Bytes of activations at the fullest moment of a backward pass, beside all gradients.

    At layer u everything saved up to it is there, and what it needs while it runs. Of a step's only micro-batch the
    gradients of layers before u do not exist yet; with `several`, those of the micro-batches before do.
    """
    saved = np.cumsum([k.saved for k in work.kept]) + [k.transient for k in work.kept]
    absent = np.concatenate([[0.0], np.cumsum(work.trained)[:-1]]) * (0 if several else gradient_bytes)
    return max(float((saved - absent).max()), 0.0)


def zero_memory(work: Workload, zero: Zero, several: bool = True) -> Memory:
    """On one card of a data-parallel run.

    Gradients stay whole until the step's one reduction, whatever the stage (engine/zero.py).

    `several`: a card has more than one micro-batch in a step.
    """
    training, world = work.training, zero.world
    size, trained, whole, moments = training.trained_bytes, sum(work.trained), sum(work.weights), sum(work.moments)
    copy = work.shape.parameters * training.bytes if work.reference_copy else 0
    activations = activation_peak(work, several, 4 if zero.stage == 0 else size)
    share = 0.0 if zero.offload_optimizer else 1 / world
    if zero.stage == 0:
        weights = whole + trained * (4 - size)
        memory = (weights + copy, trained * 4.0, moments, activations, 0.0)
    elif zero.stage < 3:
        flush = min(a.REDUCE_BUCKET, trained) * size + share * trained * size
        update = share * trained * (2 * size + (4 if size < 4 else 0))
        memory = (whole + copy, trained * size, share * (a.MASTER * trained + moments), activations, max(flush, update))
    else:
        kept_whole = 0.0 if zero.offload_param else work.frozen_groups
        gathered = kept_whole + min(whole - kept_whole, a.LIVE_PARAMETERS * float(training.bytes))
        weights = gathered + (0.0 if zero.offload_param else whole / world) + copy
        buffers = trained * size / world + share * trained * (4 if size < 4 else 0)
        buffers = max(buffers, whole - gathered)  # evaluation gathers all weights
        memory = (
            weights + min(a.REDUCE_BUCKET, trained) * size,
            trained * size,
            share * (a.MASTER * trained + moments),
            activations,
            buffers,
        )
    return Memory(*memory, _workspace(work, sum(memory[:3]) + max(memory[3:]), world > 1))


def pipeline_memory(work: Workload, in_flight: Sequence[int], micro_batches: int) -> np.ndarray:
    """(stages, layers + 1, layers + 1) bytes of stage p when it holds layers[start:end]; `in_flight`: micro-batches it
    keeps at once.

    torch.distributed.pipelining allocates the buffers that receive activations and gradients for every micro-batch of a
    step. Quantised weights cannot be left out: every stage has them whole. For evaluation every stage borrows the other
    stages' weights (engine/pipeline/engine.py).
    """
    shape, training, layers = work.shape, work.training, work.shape.layers
    each = a.PIPELINE_GRADIENT + (a.MASTER if training.trained_bytes < 4 else 0.0)
    quantised = [training.quantised_bytes(u) for u in layers]
    plain = [w - q for w, q in zip(work.weights, quantised, strict=True)]
    static = [w + n * each + m for w, n, m in zip(plain, work.trained, work.moments, strict=True)]
    if work.reference_copy:
        static = [s + u.parameters * training.bytes for s, u in zip(static, layers, strict=True)]
    kept = work.kept
    crossing = boundary_bytes(work)
    number = len(layers)
    saved, states = _ranges([k.saved for k in kept]), _ranges(static)
    running = np.zeros((number + 1, number + 1))  # one micro-batch in its backward pass, at its fullest
    for start in range(number):
        running[start, start + 1 :] = np.maximum.accumulate(
            saved[start, start + 1 :] + [k.transient for k in kept[start:]]
        )
    if layers[-3].kind == layers[-2].kind:  # without the head beside it the last layer runs whole, as the one before it
        for table in (saved, running):
            table[:-2, -2] += kept[-3].saved - kept[-2].saved
    received = crossing[:, None] + np.where(np.arange(number + 1) < number, crossing * _returns(work), 0.0)[None, :]
    if shape.tied:  # a head without the embeddings beside it holds the table once more
        states[shape.merge + 1 :, number] += work.table * (
            training.bytes + (each + a.ADAM_MOMENTS if "text" in training.full else 0.0)
        )
    states += sum(quantised)
    fixed = states + running + received * micro_batches
    borrowing = states + sum(plain) - _ranges(plain)
    stages = [np.maximum(fixed + (flying - 1) * saved + flying * crossing[None, :], borrowing) for flying in in_flight]
    return np.stack([_workspace_array(work, stage) for stage in stages])


def stage_memory(work: Workload, start: int, end: int, total: float) -> Memory:
    """The bytes of a stage of layers[start:end] by part; `total`: its entry in the table of `pipeline_memory`."""
    copied = work.table if work.shape.tied and end == len(work.shape.layers) and start > work.shape.merge else 0
    again = copied if "text" in work.training.full else 0
    trained = sum(work.trained[start:end]) + again
    master = a.MASTER if work.training.trained_bytes < 4 else 0.0
    quantised = sum(work.training.quantised_bytes(u) for n, u in enumerate(work.shape.layers) if not start <= n < end)
    weights = sum(work.weights[start:end]) + copied * work.training.bytes + quantised
    optimizer = trained * master + sum(work.moments[start:end]) + again * a.ADAM_MOMENTS
    states = (weights, trained * a.PIPELINE_GRADIENT, optimizer)
    workspace = total - (total - a.CUDA_CONTEXT - a.NCCL_BUFFERS - weight_workspace(work.shape, work.training)) / (
        1 + a.FRAGMENTATION
    )
    return Memory(*states, total - sum(states) - workspace, 0.0, workspace)


def boundary_bytes(work: Workload) -> np.ndarray:
    """(layers + 1,) bytes of what a micro-batch sends across the boundary before each layer; 0 at both ends of the model."""
    shape, size, load = work.shape, work.training.bytes, work.load
    vision = load.tiles * shape.vision.patches * shape.vision.hidden * float(size)
    text = load.tokens * shape.text.hidden * float(size)
    inside = [vision if u.kind in ("vision", "merge") else text for u in shape.layers[1:]]
    return np.array([0.0, *inside, 0.0])


def _returns(work: Workload) -> np.ndarray:
    """(layers + 1,) whether a gradient comes back across the boundary before each layer."""
    return np.array([*(1.0 if g.input else 0.0 for g in work.gradients), 0.0])


def _ranges(values: Sequence[float]) -> np.ndarray:
    """[start, end] -> the sum of values[start:end]."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return sums[None, :] - sums[:, None]


def _workspace(work: Workload, used: float, several: bool) -> float:
    return (
        a.CUDA_CONTEXT
        + (a.NCCL_BUFFERS if several else 0.0)
        + weight_workspace(work.shape, work.training)
        + a.FRAGMENTATION * used
    )


def _workspace_array(work: Workload, used: np.ndarray) -> np.ndarray:
    return used * (1 + a.FRAGMENTATION) + a.CUDA_CONTEXT + a.NCCL_BUFFERS + weight_workspace(work.shape, work.training)
