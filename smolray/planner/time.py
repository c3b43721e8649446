"""Seconds: computing on a GPU, communication over the links, and a whole optimizer step of each strategy.

In: a Workload (the mean micro-batch), GPUs and links. Out: seconds by part. assumptions.py has what cannot be counted.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np

from smolray.planner import assumptions as a
from smolray.planner.activations import Gradients, adapter_bytes, kept_bytes
from smolray.planner.inventory import GPU, Interconnect, Inventory
from smolray.planner.memory import Workload, Zero
from smolray.planner.schedule import Schedule, StageTimes, balance, simulate
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
        mlp = sum(linear.weights for _, linear in layer.linears if linear.input in ("norm2", "product"))
        rows = load.label_tokens if layer.name == shape.last_text_layer else load.tokens
        return 2.0 * (load.tokens * (weights - mlp) + rows * mlp), 4.0 * load.pairs * t.heads * t.head_dim
    return 2.0 * load.label_tokens * t.vocab * t.hidden, 0.0


def layer_seconds(work: Workload, layer: PipelineLayer, gradient: Gradients, gpu: GPU) -> tuple[float, float]:
    """(forward, backward) seconds of one layer for one micro-batch on a GPU.

    The larger of computing plus memory traffic, and of launching the kernels. Frozen weights have no weight gradient.
    Before anything trained there is no backward pass. A checkpointed layer runs its forward pass twice.
    """
    training = work.training
    linear, attention = forward_flops(work.shape, layer, work.load)
    adapters = 2.0 * _positions(work.shape, layer, work.load) * training.lora_parameters(layer)
    share = a.MATMUL_SHARE_MEASURED if gpu.measured else a.MATMUL_SHARE_PUBLISHED
    speed = gpu.tflops(training.dtype) * 1e12 * share
    moved, bandwidth = _moved_bytes(work, layer), gpu.bandwidth * a.BANDWIDTH_SHARE
    launches = a.LAUNCH_SECONDS[layer.kind] * (a.LORA_LAUNCHES if adapters else 1.0)

    forward = max((linear + attention + adapters) / speed + moved / bandwidth, launches)
    ahead = 2 * forward if work.reference_pass or work.first_pass else forward
    if not gradient.any:
        return ahead if layer.kind == "text" or work.first_pass else forward, 0.0

    trained = _trained_share(work, layer)
    back = linear * (1.0 + trained) if gradient.input or layer.kind != "vision_embeddings" else linear
    operations = back + a.ATTENTION_BACKWARD * attention + 2 * adapters
    backward = max(operations / speed + a.BACKWARD_TRAFFIC * moved / bandwidth, launches)
    backward += gradient_seconds(work, layer, gpu)
    return ahead, backward + (forward if work.checkpoints(layer.name) else 0.0)


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


def gradient_seconds(work: Workload, layer: PipelineLayer, gpu: GPU) -> float:
    """Seconds of a micro-batch to write the gradients of a layer's trained weights and to add them to earlier ones."""
    shape, training = work.shape, work.training
    tables = ("merge", "head") if training.head else ("merge",)
    vocabulary = shape.text.vocab * shape.text.hidden if layer.kind in tables and "text" in training.full else 0
    size = float(training.trained_bytes) * max(training.trained_parameters(layer), vocabulary)
    fresh = float(training.trained_bytes) * vocabulary / a.HOST_FRESH_BYTES if gpu.host else 0.0
    return a.GRADIENT_TRAFFIC * size / (gpu.bandwidth * a.BANDWIDTH_SHARE) + fresh


def layer_table(work: Workload, gpu: GPU) -> list[tuple[float, float]]:
    """(forward, backward) seconds of every layer on a GPU."""
    if gpu in work.seconds:
        return work.seconds[gpu]

    # layers of one kind are alike, except the last text layer
    known: dict[tuple[str, Gradients, bool, bool], tuple[float, float]] = {}
    table = work.seconds[gpu] = []
    for layer, gradient in zip(work.shape.layers, work.gradients, strict=True):
        key = (layer.kind, gradient, work.checkpoints(layer.name), layer.name == work.shape.last_text_layer)
        if key not in known:
            known[key] = layer_seconds(work, layer, gradient, gpu)
        table.append(known[key])
    return table


def micro_batch_seconds(work: Workload, gpu: GPU) -> float:
    """Seconds of one micro-batch, forward and backward, on a GPU that holds the whole model."""
    if gpu not in work.whole_seconds:
        work.whole_seconds[gpu] = sum(map(sum, layer_table(work, gpu)))
    return work.whole_seconds[gpu]


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
    hops = [inventory.between(x, y) for x, y in zip(order, [*order[1:], order[0]], strict=True)]
    return slowest(hops)


def slowest(links: Sequence[Interconnect]) -> Interconnect:
    """The smallest bandwidth and the largest latency of these links."""
    found = links[0]
    for link in links[1:]:
        found = found.slower(link)
    return found


def zero_seconds(
    work: Workload, zero: Zero, gpus: Sequence[GPU], hop: Interconnect, micro_batches: int, data: float
) -> tuple[StepTime, tuple[int, ...]]:
    """Seconds of one step of a data-parallel run, and the micro-batches assigned to each GPU.

    On stages 0 to 2 faster GPUs get more micro-batches. On stage 3 every pass is collective, so the slowest GPU sets
    the pace.

    Args:
        work: the mean micro-batch.
        zero: the stage and what it offloads.
        gpus: of each rank.
        hop: the slowest hop between them.
        micro_batches: of the step, over all GPUs.
        data: seconds to decode and collate them.
    """
    passes = _zero3_passes if zero.stage == 3 else _replicated_passes
    compute, communication, shares = passes(work, zero, gpus, hop, micro_batches)
    return StepTime(compute, communication, _update_seconds(work, zero, gpus), data), shares


def _replicated_passes(
    work: Workload, zero: Zero, gpus: Sequence[GPU], hop: Interconnect, micro_batches: int
) -> tuple[float, float, tuple[int, ...]]:
    """(computing, communication, shares) of a step on stages 0 to 2."""
    world, trained, size = len(gpus), sum(work.trained), float(work.training.trained_bytes)
    seconds = [micro_batch_seconds(work, gpu) for gpu in gpus]
    shares = balance([1 / s for s in seconds], micro_batches)
    # one of the workers gets the larger micro-batches of a step by chance
    compute = max(
        s * (n + largest_of(world) * spread(work, gpu) * math.sqrt(n))
        for n, s, gpu in zip(shares, seconds, gpus, strict=True)
    )
    talk = ring_seconds(trained * (4.0 if zero.stage == 0 else size), world, hop, messages=_buckets(trained))
    # DeepSpeed all-reduces whole buckets (use_multi_rank_bucket_allreduce) and gathers the new weights
    if zero.stage:
        talk += ring_seconds(trained * size, world, hop, passes=1, messages=_buckets(trained))
    return compute, talk, shares


def _zero3_passes(
    work: Workload, zero: Zero, gpus: Sequence[GPU], hop: Interconnect, micro_batches: int
) -> tuple[float, float, tuple[int, ...]]:
    """(computing, communication, shares) of a step on stage 3."""
    world, trained, size = len(gpus), sum(work.trained), float(work.training.trained_bytes)
    layers = len(work.shape.layers)
    shares = balance([1.0] * world, micro_batches)
    longest = max(micro_batch_seconds(work, gpu) * (1 + largest_of(world) * spread(work, gpu)) for gpu in gpus)
    hooks = a.ZERO3_HOST_LAYER_SECONDS if any(gpu.host for gpu in gpus) else a.ZERO3_LAYER_SECONDS
    compute = max(shares) * (longest + 2 * layers * hooks)

    whole = sum(work.weights) - (0.0 if zero.offload_param else work.frozen_groups)
    gathers = 1 if 2 * whole / work.training.bytes <= a.LIVE_PARAMETERS else 3 if work.checkpointing else 2
    talk = max(shares) * gathers * ring_seconds(whole, world, hop, passes=1, messages=layers)
    talk += ring_seconds(trained * size, world, hop, passes=1, messages=_buckets(trained))
    if zero.offload_param:
        talk += max(shares) * gathers * whole / world / a.PCIE_BYTES
    return compute, talk, shares


def _update_seconds(work: Workload, zero: Zero, gpus: Sequence[GPU]) -> float:
    """Seconds of the optimizer on the slowest GPU, or on the CPU where it is offloaded."""
    trained = sum(work.trained)
    own = trained if zero.stage == 0 else trained / len(gpus)
    if zero.offload_optimizer:
        return own / a.CPU_ADAM_PARAMETERS + 2 * own * float(work.training.trained_bytes) / a.PCIE_BYTES
    return own * a.OPTIMIZER_TRAFFIC / (min(gpu.bandwidth for gpu in gpus) * a.BANDWIDTH_SHARE)


def pipeline_seconds(
    work: Workload,
    crossing: np.ndarray,
    partition: Sequence[int],
    gpus: Sequence[GPU],
    links: Sequence[Interconnect],
    micro_batches: int,
    data: float,
    schedule: Schedule,
    replicas: int = 1,
    hop: Interconnect | None = None,
) -> StepTime:
    """Seconds of one step of a pipeline.

    Args:
        work: the mean micro-batch.
        crossing: (layers + 1,) bytes across the boundary before each layer, one way.
        partition: layers in each stage.
        gpus: the slowest GPU of each stage.
        links: from each stage to the next.
        micro_batches: of the step, in each replica.
        data: seconds to decode and collate them.
        schedule: engine.schedule.
        replicas: pipelines that share the data.
        hop: the slowest hop between the replicas of a stage.
    """
    ends = np.cumsum(partition).tolist()
    spans = [(end - size, end) for size, end in zip(partition, ends, strict=True)]
    stages = _stage_times(work, crossing, spans, gpus, links)
    trained = [sum(work.trained[start:end]) for start, end in spans]

    compute = max(micro_batches * (s.forward + s.backward) for s in stages)
    seconds = _schedule_seconds(stages, micro_batches, schedule)
    # stages wait for the one that has the larger micro-batch
    seconds += compute * largest_of(len(partition)) * max(spread(work, gpu) for gpu in gpus)

    talk = seconds - compute + a.PIPELINE_STEP_SECONDS  # waiting for other stages and for links
    if replicas > 1 and hop is not None:
        talk += max(ring_seconds(n * a.PIPELINE_GRADIENT, replicas, hop) for n in trained)
    shape = work.shape
    embeddings_apart = partition[-1] < len(shape.layers) - shape.merge
    if shape.tied and "text" in work.training.full and embeddings_apart:
        table = shape.text.vocab * shape.text.hidden * a.PIPELINE_GRADIENT
        talk += ring_seconds(table, 2, slowest(links))

    update = max(
        n * a.OPTIMIZER_TRAFFIC / (gpu.bandwidth * a.BANDWIDTH_SHARE) for n, gpu in zip(trained, gpus, strict=True)
    )
    return StepTime(compute, talk, update, data)


def _stage_times(
    work: Workload,
    crossing: np.ndarray,
    spans: Sequence[tuple[int, int]],
    gpus: Sequence[GPU],
    links: Sequence[Interconnect],
) -> list[StageTimes]:
    """Seconds of a micro-batch on each stage; `spans`: the (first, end) of its layers."""
    tables, stages = {gpu: layer_table(work, gpu) for gpu in set(gpus)}, []
    for number, (start, end) in enumerate(spans):
        each = tables[gpus[number]][start:end]
        forward, backward = sum(f for f, _ in each), sum(b for _, b in each)
        send = _send_seconds(links[number], crossing[end]) if number + 1 < len(spans) else 0.0
        returns = number > 0 and work.gradients[start].input
        back = _send_seconds(links[number - 1], crossing[start]) if returns else 0.0
        stages.append(StageTimes(forward, backward, send, back))
    return stages


def _schedule_seconds(stages: Sequence[StageTimes], micro_batches: int, schedule: Schedule) -> float:
    """Seconds of a step by simulation.

    After the pipeline is full, every further micro-batch adds the same time: a long step is extrapolated from a short
    one.
    """
    few = min(micro_batches, max(4 * len(stages), 8))
    seconds = simulate(stages, few, schedule)
    if micro_batches > few:
        seconds += (micro_batches - few) * (seconds - simulate(stages, few - len(stages), schedule)) / len(stages)
    return seconds


def data_seconds(work: Workload, micro_batches: int, cores: float) -> float:
    """Seconds to decode and collate a step's micro-batches on `cores` CPU cores.

    Tiles with precomputed features are not decoded.
    """
    tiles = 0.0 if "vision" in work.shape.left_out else work.load.tiles * a.TILE_SECONDS
    return micro_batches * (tiles + work.load.samples * a.SAMPLE_SECONDS) / cores


def _positions(shape: ModelShape, layer: PipelineLayer, load: Load) -> float:
    """The positions of a micro-batch that a layer's linear layers run on."""
    if layer.kind == "vision":
        return load.tiles * shape.vision.patches
    if layer.kind == "merge":
        return load.tiles * shape.tokens_per_tile
    return load.label_tokens if layer.kind == "head" else load.tokens


def _buckets(parameters: float) -> int:
    """DeepSpeed's buckets of gradients for so many parameters."""
    return max(1, -int(-parameters // a.REDUCE_BUCKET))


def _send_seconds(link: Interconnect, size: float) -> float:
    return float(size) / (link.bandwidth * a.LINK_SHARE) + link.latency
