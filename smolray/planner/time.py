"""Seconds of what every strategy does: a layer and a micro-batch on a GPU, a collective over links, decoding of data.

In: a Workload (the mean micro-batch), GPUs and links. Out: seconds. zero_time.py and pipeline_time.py put them together
to a step; assumptions.py has what cannot be counted.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from statistics import NormalDist
from typing import NamedTuple

from smolray.planner import assumptions as a
from smolray.planner.activations import MLP_INPUTS, Gradients, adapter_bytes, kept_bytes, positions
from smolray.planner.gpus import GPU
from smolray.planner.inventory import Interconnect, Inventory
from smolray.planner.memory import Workload, per_workload
from smolray.planner.shapes import ModelShape, PipelineLayer, Training
from smolray.planner.statistics import Load


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by part. `data` runs at the same time as the rest."""

    compute: float
    communication: float
    optimizer: float
    data: float

    @property
    def total(self) -> float:
        return max(self.compute + self.communication + self.optimizer + a.STEP_OVERHEAD, self.data)

    @property
    def limit(self) -> str:
        """The name of the part that limits the step."""
        parts = asdict(self)
        working = self.compute + self.communication + self.optimizer
        if self.data > working:
            return "data"
        return max((name for name in parts if name != "data"), key=lambda name: parts[name])


def forward_flops(shape: ModelShape, layer: PipelineLayer, load: Load) -> tuple[float, float]:
    """Floating-point operations of one micro-batch's forward pass through a layer.

    Two for each multiply-add. Returns (of matrix products with weights, of attention).
    """
    v, t = shape.vision, shape.text
    patches = load.tiles * v.patches
    weights = sum(linear.weights for _, linear in layer.linears)
    if layer.kind == "vision_embeddings":
        return 2.0 * patches * v.channels * v.patch_size**2 * v.hidden, 0.0
    if layer.kind == "vision":
        return 2.0 * patches * weights, 4.0 * patches * v.patches * v.hidden
    if layer.kind == "merge":
        return 2.0 * load.tiles * shape.tokens_per_tile * weights, 0.0
    if layer.kind == "text":
        mlp = sum(linear.weights for _, linear in layer.linears if linear.input in MLP_INPUTS)
        rows = load.label_tokens if layer.name == shape.last_text_layer else load.tokens
        return 2.0 * (load.tokens * (weights - mlp) + rows * mlp), 4.0 * load.pairs * t.heads * t.head_dim
    return 2.0 * load.label_tokens * t.vocab * t.hidden, 0.0


class LayerWork(NamedTuple):
    """What one micro-batch makes a layer do, on any GPU."""

    forward: float  # floating-point operations of a forward pass
    backward: float | None  # of a backward pass; None: there is none, because nothing before it or in it is trained
    moved: float  # bytes that a forward pass reads and writes
    launches: float  # seconds to launch the kernels of a forward pass
    gradients: float  # bytes of the gradients of its trained weights
    fresh: float  # of them, bytes that a CPU allocates anew
    ahead: int  # forward passes before the backward pass
    again: bool  # whether the backward pass runs the forward pass again


def layer_work(work: Workload, layer: PipelineLayer, gradient: Gradients) -> LayerWork:
    """The work of one layer for one micro-batch. Frozen weights have no weight gradient."""
    training = work.training
    linear, attention = forward_flops(work.shape, layer, work.load)
    adapters = 2.0 * sum(
        positions(work.shape, layer, each, work.load) * training.adapter_parameters(group, each)
        for group, each in layer.linears
    )
    launches = a.LAUNCH_SECONDS[layer.kind] * (a.LORA_LAUNCHES if adapters else 1.0)

    referred = work.reference_pass and (gradient.any or layer.kind == "text")
    backward = None
    if gradient.any:
        trained = _trained_share(work, layer)
        back = linear * (1.0 + trained) if gradient.input or layer.kind != "vision_embeddings" else linear
        backward = back + a.ATTENTION_BACKWARD * attention + 2 * adapters
    gradients, fresh = _gradient_bytes(work, layer)
    return LayerWork(
        linear + attention + adapters,
        backward,
        _moved_bytes(work, layer),
        launches,
        gradients,
        fresh,
        2 if referred or work.first_pass else 1,
        work.checkpoints(layer.name),
    )


def layer_seconds(todo: LayerWork, dtype: str, gpu: GPU) -> tuple[float, float]:
    """(forward, backward) seconds of one layer for one micro-batch on a GPU; `dtype`: as model.dtype names it.

    The larger of computing plus memory traffic, and of launching the kernels. A checkpointed layer runs its forward
    pass twice.
    """
    share = a.MATMUL_SHARE_MEASURED if gpu.measured else a.MATMUL_SHARE_PUBLISHED
    speed, bandwidth = gpu.tflops(dtype) * 1e12 * share, gpu.bandwidth * a.BANDWIDTH_SHARE
    forward = max(todo.forward / speed + todo.moved / bandwidth, todo.launches) * gpu.slowdown
    if todo.backward is None:
        return todo.ahead * forward, 0.0

    backward = max(todo.backward / speed + a.BACKWARD_TRAFFIC * todo.moved / bandwidth, todo.launches)
    # gradients are written, and added to those of earlier micro-batches
    backward += a.GRADIENT_TRAFFIC * todo.gradients / bandwidth + (todo.fresh / a.HOST_FRESH_BYTES if gpu.host else 0.0)
    return todo.ahead * forward, backward * gpu.slowdown + (forward if todo.again else 0.0)


def _moved_bytes(work: Workload, layer: PipelineLayer) -> float:
    """Bytes that a forward pass through a layer reads and writes: elementwise kernels, adapters' casts, weights."""
    shape, training, load = work.shape, work.training, work.load
    everything = Training(frozenset(("vision", "connector", "text")), None, training.dtype)
    moved = kept_bytes(shape, layer, everything, Gradients(True, True), load).saved * a.TRAFFIC.get(layer.kind, 2.0)
    moved += 1.5 * adapter_bytes(shape, layer, training, load)  # PEFT's casts, read and written
    unpacked = 2 * sum(linear.weights for _, linear in layer.linears) if training.bits < 16 else 0
    return moved + (training.weight_bytes(layer) + unpacked)


def _trained_share(work: Workload, layer: PipelineLayer) -> float:
    """The share of a layer's weights whose gradient is computed."""
    full = work.training.full
    if layer.kind == "head":
        return 1.0 if "text" in full else 0.0
    return sum(n for group, n in layer.by_group.items() if group in full) / max(layer.parameters, 1)


def _gradient_bytes(work: Workload, layer: PipelineLayer) -> tuple[float, float]:
    """Bytes of the gradients of a layer's trained weights, and of its table of the vocabulary, for one micro-batch."""
    shape, training = work.shape, work.training
    tables = ("merge", "head") if training.head else ("merge",)
    vocabulary = shape.text.vocab * shape.text.hidden if layer.kind in tables and "text" in training.full else 0
    size = float(training.trained_bytes)
    return size * max(training.trained_parameters(layer), vocabulary), size * vocabulary


@per_workload
def layer_table(work: Workload, gpu: GPU) -> list[tuple[float, float]]:
    """(forward, backward) seconds of every layer on a GPU."""
    kinds, numbers = _layer_kinds(work)
    seconds = [layer_seconds(todo, work.training.dtype, gpu) for todo in kinds]
    return [seconds[number] for number in numbers]


@per_workload
def _layer_kinds(work: Workload) -> tuple[list[LayerWork], list[int]]:
    """The different works of the layers, and which of them each layer has."""
    # layers of one kind are alike, except the last text layer
    known: dict[tuple[str, Gradients, bool, bool], int] = {}
    kinds, numbers = list[LayerWork](), list[int]()
    for layer, gradient in zip(work.shape.layers, work.gradients, strict=True):
        key = (layer.kind, gradient, work.checkpoints(layer.name), layer.name == work.shape.last_text_layer)
        if key not in known:
            known[key] = len(kinds)
            kinds.append(layer_work(work, layer, gradient))
        numbers.append(known[key])
    return kinds, numbers


@per_workload
def micro_batch_seconds(work: Workload, gpu: GPU) -> float:
    """Seconds of one micro-batch, forward and backward, on a GPU that holds the whole model."""
    return sum(map(sum, layer_table(work, gpu)))


@per_workload
def spread(work: Workload, gpu: GPU) -> float:
    """Standard deviation of a micro-batch's seconds, as a share of their mean.

    The number of tiles decides the time of the vision tower, the number of tokens that of all other layers.
    """
    vision = sum(
        sum(seconds)
        for layer, seconds in zip(work.shape.layers, layer_table(work, gpu), strict=True)
        if layer.kind.startswith("vision")
    )
    share = vision / max(micro_batch_seconds(work, gpu), 1e-12)
    return share * work.load.tiles_spread + (1 - share) * work.load.tokens_spread


@cache
def largest_of(number: int) -> float:
    """The expected largest of `number` standard normal values (Blom, 1958)."""
    return NormalDist().inv_cdf((number - 0.375) / (number + 0.25)) if number > 1 else 0.0


def ring_seconds(size: float, world: int, link: Interconnect, passes: int = 2, messages: int = 1) -> float:
    """Seconds of a ring collective over `size` bytes.

    Each hop carries passes * (world - 1) / world of the bytes (Patarasuk and Yuan, 2009). NCCL and gloo build the ring
    node by node: it crosses each network once in each direction, and the slowest of them decides.

    Args:
        size: bytes.
        world: GPUs in the ring.
        link: its slowest hop.
        passes: 2 for all-reduce, 1 for all-gather or reduce-scatter.
        messages: pieces in which the bytes are sent.
    """
    if world < 2:
        return 0.0
    return passes * (world - 1) * (size / world / (link.bandwidth * a.LINK_SHARE) + messages * link.latency)


def slowest_hop(inventory: Inventory, nodes: Sequence[int]) -> Interconnect:
    """The slowest hop of a ring over GPUs. `nodes`: the node of each of them."""
    order = sorted(nodes)
    return slowest([inventory.between(x, y) for x, y in set(zip(order, [*order[1:], order[0]], strict=True))])


def slowest(links: Sequence[Interconnect]) -> Interconnect:
    """The smallest bandwidth and the largest latency of these links."""
    return Interconnect(min(link.bandwidth for link in links), max(link.latency for link in links))


def data_seconds(work: Workload, micro_batches: int, cores: float) -> float:
    """Seconds to decode and collate a step's micro-batches on `cores` CPU cores.

    Tiles with precomputed features are not decoded.
    """
    tiles = 0.0 if "vision" in work.shape.left_out else work.load.tiles * a.TILE_SECONDS
    return micro_batches * (tiles + work.load.samples * a.SAMPLE_SECONDS) / cores
