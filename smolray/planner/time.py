"""Seconds: computing on a card, talking over the links, and a whole optimizer step of each strategy.

In: Workload (the mean micro-batch), cards and links. Out: seconds by part. What cannot be counted is in assumptions.py.
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
    """Seconds of one optimizer step by part; `data` runs beside the rest."""

    compute: float
    communication: float
    optimizer: float
    data: float

    @property
    def total(self) -> float:
        return max(self.compute + self.communication + self.optimizer + a.STEP_OVERHEAD, self.data)

    @property
    def limit(self) -> str:
        """What takes longest, as a word."""
        parts = asdict(self)
        working = self.compute + self.communication + self.optimizer
        if self.data > working:
            return "data"
        return max((name for name in parts if name != "data"), key=lambda name: parts[name])


def forward_flops(shape: ModelShape, layer: PipelineLayer, load: Load) -> tuple[float, float]:
    """(matrix products with weights, attention) of one micro-batch's forward pass, two operations for each
    multiply-add.
    """
    v, t = shape.vision, shape.text
    patches = load.tiles * v.patches
    linear = sum(linear.weights for _, linear in layer.linears)
    if layer.kind == "vision_embeddings":
        return 2.0 * patches * v.channels * v.patch_size**2 * v.hidden, 0.0
    if layer.kind == "vision":
        return 2.0 * patches * linear, 4.0 * patches * v.patches * v.hidden
    if layer.kind == "merge":
        return 2.0 * load.tiles * shape.tokens_per_tile * linear, 0.0
    if layer.kind == "text":
        mlp = sum(linear.weights for _, linear in layer.linears if linear.input in ("norm2", "product"))
        rows = load.label_tokens if layer.name == shape.last_text_layer else load.tokens
        return 2.0 * (load.tokens * (linear - mlp) + rows * mlp), 4.0 * load.pairs * t.heads * t.head_dim
    return 2.0 * load.label_tokens * t.vocab * t.hidden, 0.0


def layer_seconds(work: Workload, layer: PipelineLayer, gradient: Gradients, gpu: GPU) -> tuple[float, float]:
    """(forward, backward) seconds of one layer for one micro-batch on a card.

    Frozen weights have no weight gradient; before anything trained there is no backward pass; a checkpointed layer runs
    forward twice.
    """
    shape, training, load = work.shape, work.training, work.load
    linear, attention = forward_flops(shape, layer, load)
    share = a.MATMUL_SHARE_MEASURED if gpu.measured else a.MATMUL_SHARE_PUBLISHED
    speed = gpu.tflops(training.dtype) * 1e12 * share
    adapters = 2.0 * _positions(shape, layer, load) * training.lora_parameters(layer)
    everything = Training(frozenset(("vision", "connector", "text")), None, training.dtype)
    moved = kept_bytes(shape, layer, everything, Gradients(True, True), load).saved * a.TRAFFIC.get(layer.kind, 2.0)
    moved += 1.5 * adapter_bytes(shape, layer, training, load)  # PEFT's casts, read and written
    moved += training.weight_bytes(layer) + (
        2 * sum(linear.weights for _, linear in layer.linears) if training.bits < 16 else 0
    )
    bandwidth = gpu.bandwidth * a.BANDWIDTH_SHARE
    launches = a.LAUNCH_SECONDS[layer.kind] * (a.LORA_LAUNCHES if adapters else 1.0)
    forward = max((linear + attention + adapters) / speed + moved / bandwidth, launches)
    ahead = 2 * forward if work.reference_pass or work.first_pass else forward
    if not gradient.any:
        return ahead if layer.kind == "text" or work.first_pass else forward, 0.0
    full = sum(n for g, n in layer.by_group.items() if g in training.full) / max(layer.parameters, 1)
    if layer.kind == "head":
        full = 1.0 if "text" in training.full else 0.0
    back = linear * (1.0 + full) if gradient.input or layer.kind != "vision_embeddings" else linear
    operations = back + a.ATTENTION_BACKWARD * attention + 2 * adapters
    backward = max(operations / speed + a.BACKWARD_TRAFFIC * moved / bandwidth, launches) + gradient_seconds(
        work, layer, gpu
    )
    return ahead, backward + (forward if work.checkpoints(layer.name) else 0.0)


def gradient_seconds(work: Workload, layer: PipelineLayer, gpu: GPU) -> float:
    """Seconds to write the gradients of a layer's trained weights in one micro-batch, and to add them to those of the
    micro-batches before it.
    """
    shape, training = work.shape, work.training
    tables = ("merge", "head") if training.head else ("merge",)
    vocabulary = shape.text.vocab * shape.text.hidden if layer.kind in tables and "text" in training.full else 0
    size = float(training.trained_bytes) * max(training.trained_parameters(layer), vocabulary)
    fresh = float(training.trained_bytes) * vocabulary / a.HOST_FRESH_BYTES if gpu.host else 0.0
    return a.GRADIENT_TRAFFIC * size / (gpu.bandwidth * a.BANDWIDTH_SHARE) + fresh


def layer_table(work: Workload, gpu: GPU) -> list[tuple[float, float]]:
    """(forward, backward) seconds of every layer on a card."""
    if gpu not in work.seconds:
        # layers of one kind are alike, but for the last
        known: dict[tuple[str, Gradients, bool, bool], tuple[float, float]] = {}
        table = work.seconds[gpu] = []
        for layer, gradient in zip(work.shape.layers, work.gradients, strict=True):
            key = (layer.kind, gradient, work.checkpoints(layer.name), layer.name == work.shape.last_text_layer)
            if key not in known:
                known[key] = layer_seconds(work, layer, gradient, gpu)
            table.append(known[key])
    return work.seconds[gpu]


def micro_batch_seconds(work: Workload, gpu: GPU) -> float:
    """Seconds of one micro-batch, forward and backward, on a card that holds the whole model."""
    if gpu not in work.whole_seconds:
        work.whole_seconds[gpu] = sum(map(sum, layer_table(work, gpu)))
    return work.whole_seconds[gpu]


def spread(work: Workload, gpu: GPU) -> float:
    """Standard deviation of a micro-batch's seconds as a share of their mean: tiles decide the vision tower's, tokens
    all others'.
    """
    vision = sum(
        sum(seconds)
        for layer, seconds in zip(work.shape.layers, layer_table(work, gpu), strict=True)
        if layer.kind.startswith("vision")
    )
    share = vision / max(micro_batch_seconds(work, gpu), 1e-12)
    return share * work.load.tiles_spread + (1 - share) * work.load.tokens_spread


def largest_of(number: int) -> float:
    """How many standard deviations the largest of so many normal values lies above their mean, as a rule (Blom, 1958)."""
    return NormalDist().inv_cdf((number - 0.375) / (number + 0.25)) if number > 1 else 0.0


def ring_seconds(size: float, world: int, link: Interconnect, passes: int = 2, messages: int = 1) -> float:
    """A ring over `world` cards whose slowest hop is `link`: `passes` 2 for all-reduce, 1 for all-gather or
    reduce-scatter.

    Each hop carries passes * (world - 1) / world of the bytes (Patarasuk and Yuan, 2009), in `messages` pieces. NCCL
    and gloo lay the ring box by box, so that each network is crossed once each way and the slowest of them decides.
    """
    if world < 2:
        return 0.0
    return passes * (world - 1) * (size / world / (link.bandwidth * a.LINK_SHARE) + messages * link.latency)


def slowest_hop(inventory: Inventory, nodes: Sequence[int]) -> Interconnect:
    """Of a ring over cards in these boxes, one entry a card."""
    order = sorted(nodes)
    hops = [inventory.between(x, y) for x, y in zip(order, [*order[1:], order[0]], strict=True)]
    link = hops[0]
    for hop in hops[1:]:
        link = link.slower(hop)
    return link


def zero_seconds(
    work: Workload, zero: Zero, gpus: Sequence[GPU], hop: Interconnect, micro_batches: int, data: float
) -> tuple[StepTime, tuple[int, ...]]:
    """One step of a data-parallel run, and the micro-batches dealt to each card.

    On stages 0 to 2 faster cards are dealt more; on stage 3 every pass is collective, so that the slowest card sets the
    pace.
    """
    shape, world = work.shape, len(gpus)
    seconds = [micro_batch_seconds(work, gpu) for gpu in gpus]
    trained = sum(work.trained)
    size = float(work.training.trained_bytes)
    if zero.stage == 3:
        shares = balance([1.0] * world, micro_batches)
        longest = max(s * (1 + largest_of(world) * spread(work, gpu)) for s, gpu in zip(seconds, gpus, strict=True))
        hooks = a.ZERO3_HOST_LAYER_SECONDS if any(gpu.host for gpu in gpus) else a.ZERO3_LAYER_SECONDS
        compute = max(shares) * (longest + 2 * len(shape.layers) * hooks)
        whole = sum(work.weights) - (0.0 if zero.offload_param else work.frozen_groups)
        gathers = 1 if 2 * whole / work.training.bytes <= a.LIVE_PARAMETERS else 3 if work.checkpointing else 2
        talk = max(shares) * gathers * ring_seconds(whole, world, hop, passes=1, messages=len(shape.layers))
        talk += ring_seconds(trained * size, world, hop, passes=1, messages=_buckets(trained))
        if zero.offload_param:
            talk += max(shares) * gathers * whole / world / a.PCIE_BYTES
    else:
        shares = balance([1 / s for s in seconds], micro_batches)
        # Chance deals one of the workers the larger micro-batches of a step.
        compute = max(
            s * (n + largest_of(world) * spread(work, gpu) * math.sqrt(n))
            for n, s, gpu in zip(shares, seconds, gpus, strict=True)
        )
        talk = ring_seconds(trained * (4.0 if zero.stage == 0 else size), world, hop, messages=_buckets(trained))
        # DeepSpeed all-reduces whole buckets (use_multi_rank_bucket_allreduce) and gathers the new weights
        if zero.stage:
            talk += ring_seconds(trained * size, world, hop, passes=1, messages=_buckets(trained))
    own = trained if zero.stage == 0 else trained / world
    if zero.offload_optimizer:
        update = own / a.CPU_ADAM_PARAMETERS + 2 * own * size / a.PCIE_BYTES
    else:
        update = own * a.OPTIMIZER_TRAFFIC / (min(gpu.bandwidth for gpu in gpus) * a.BANDWIDTH_SHARE)
    return StepTime(compute, talk, update, data), shares


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
    """One step of a pipeline.

    `crossing`: bytes across the boundary before each layer; `cards`: the slowest card of each stage; `links`: from each
    stage to the next; `hop`: between replicas of a stage.
    """
    start = 0
    tables = {gpu: layer_table(work, gpu) for gpu in set(gpus)}
    stages, trained = [], []
    for number, size in enumerate(partition):
        end = start + size
        each = tables[gpus[number]][start:end]
        send = _send(links[number], crossing[end]) if number + 1 < len(partition) else 0.0
        back = _send(links[number - 1], crossing[start]) if number and work.gradients[start].input else 0.0
        stages.append(StageTimes(sum(f for f, _ in each), sum(b for _, b in each), send, back))
        trained.append(sum(work.trained[start:end]))
        start = end
    few = min(
        micro_batches, max(4 * len(partition), 8)
    )  # beyond the ramps a step grows by one bottleneck a micro-batch
    seconds = simulate(stages, few, schedule)
    if micro_batches > few:
        seconds += (micro_batches - few) * (seconds - simulate(stages, few - len(partition), schedule)) / len(partition)
    computing = max(micro_batches * (s.forward + s.backward) for s in stages)
    # stages wait for whichever has the larger micro-batch
    seconds += computing * largest_of(len(partition)) * max(spread(work, gpu) for gpu in gpus)
    talk = seconds - computing + a.PIPELINE_STEP_SECONDS  # waiting for others and for links
    if replicas > 1 and hop is not None:
        talk += max(ring_seconds(n * a.PIPELINE_GRADIENT, replicas, hop) for n in trained)
    if work.shape.tied and "text" in work.training.full and partition[-1] < len(work.shape.layers) - work.shape.merge:
        link = links[0]
        for other in links[1:]:
            link = link.slower(other)
        talk += ring_seconds(work.shape.text.vocab * work.shape.text.hidden * a.PIPELINE_GRADIENT, 2, link)
    update = max(
        n * a.OPTIMIZER_TRAFFIC / (gpu.bandwidth * a.BANDWIDTH_SHARE) for n, gpu in zip(trained, gpus, strict=True)
    )
    return StepTime(computing, talk, update, data)


def data_seconds(work: Workload, micro_batches: int, cores: float) -> float:
    """Decoding and collating a step's micro-batches on so many cores; features that were made before need no decoding."""
    tiles = 0.0 if "vision" in work.shape.left_out else work.load.tiles * a.TILE_SECONDS
    return micro_batches * (tiles + work.load.samples * a.SAMPLE_SECONDS) / cores


def _positions(shape: ModelShape, layer: PipelineLayer, load: Load) -> float:
    if layer.kind == "vision":
        return load.tiles * shape.vision.patches
    return (
        load.tiles * shape.tokens_per_tile
        if layer.kind == "merge"
        else load.label_tokens
        if layer.kind == "head"
        else load.tokens
    )


def _buckets(parameters: float) -> int:
    return max(1, -int(-parameters // a.REDUCE_BUCKET))


def _send(link: Interconnect, size: float) -> float:
    return float(size) / (link.bandwidth * a.LINK_SHARE) + link.latency
