"""Seconds of an optimizer step of a data-parallel run under DeepSpeed.

In: a Workload (the mean micro-batch), the GPUs and the slowest hop between them. Out: StepTime, and how the
micro-batches of the step are divided over the GPUs.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from smolray.planner import assumptions as a
from smolray.planner.gpus import GPU
from smolray.planner.inventory import Interconnect
from smolray.planner.memory import Workload, Zero
from smolray.planner.schedule import balance
from smolray.planner.time import StepTime, largest_of, micro_batch_seconds, ring_seconds, spread


@dataclass(frozen=True)
class Division:
    """How the micro-batches of a data-parallel step are divided over the GPUs.

    `shares`: micro-batches of each GPU. `seconds`: until the last of them has computed its own.
    """

    shares: tuple[int, ...]
    seconds: float


def divide(
    work: Workload, kinds: Sequence[GPU], kind_of: Sequence[int], micro_batches: int, by_speed: bool
) -> Division:
    """The micro-batches of a step divided over the GPUs: more to faster ones, or equally.

    One of the workers gets the larger micro-batches of a step by chance. Divided equally every pass is collective
    (ZeRO-3), so that each waits for the slowest GPU and for the largest of the micro-batches that run together.

    Args:
        work: the mean micro-batch.
        kinds: the kinds of GPUs.
        kind_of: the number of the kind of each rank.
        micro_batches: of the step.
        by_speed: more to faster GPUs.
    """
    seconds, world = [micro_batch_seconds(work, gpu) for gpu in kinds], len(kind_of)
    chances = [largest_of(world) * spread(work, gpu) for gpu in kinds]
    if not by_speed:
        each, more = divmod(micro_batches, world)
        shares = (each + 1,) * more + (each,) * (world - more)
        return Division(shares, max(shares) * max(s * (1 + c) for s, c in zip(seconds, chances, strict=True)))

    speeds = [1 / s for s in seconds]
    shares = balance([speeds[kind] for kind in kind_of], micro_batches)
    given = set(zip(shares, kind_of, strict=True))
    return Division(shares, max(seconds[kind] * (n + chances[kind] * math.sqrt(n)) for n, kind in given))


def zero_seconds(
    work: Workload, zero: Zero, gpus: Collection[GPU], hop: Interconnect, division: Division, data: float
) -> StepTime:
    """Seconds of one step of a data-parallel run.

    Args:
        work: the mean micro-batch.
        zero: the stage and what it offloads.
        gpus: the kinds of GPUs that it runs on.
        hop: the slowest hop between them.
        division: of the step's micro-batches, by speed on stages 0 to 2, equally on stage 3.
        data: seconds to decode and collate the step's micro-batches.
    """
    if zero.stage == 3:
        rounds, hooks = max(division.shares), _hook_seconds(work, gpus)
        compute = division.seconds + rounds * hooks
        communication = _zero3_communication(work, zero, hop, rounds)
    else:
        compute, communication = division.seconds, _replicated_communication(work, zero, hop)
    return StepTime(compute, communication, _update_seconds(work, zero, gpus), data)


def _hook_seconds(work: Workload, gpus: Collection[GPU]) -> float:
    """Seconds of DeepSpeed's hooks around all layers, for the two passes of a micro-batch on stage 3."""
    each = a.ZERO3_HOST_LAYER_SECONDS if any(gpu.host for gpu in gpus) else a.ZERO3_LAYER_SECONDS
    return 2 * len(work.shape.layers) * each


def _replicated_communication(work: Workload, zero: Zero, hop: Interconnect) -> float:
    """Seconds of the collectives of a step on stages 0 to 2."""
    trained, size = work.trained_parameters, float(work.training.trained_bytes)
    talk = ring_seconds(trained * (4.0 if zero.stage == 0 else size), zero.world, hop, messages=_buckets(trained))
    # DeepSpeed all-reduces whole buckets (use_multi_rank_bucket_allreduce) and gathers the new weights
    if zero.stage:
        talk += ring_seconds(trained * size, zero.world, hop, passes=1, messages=_buckets(trained))
    return talk


def _zero3_communication(work: Workload, zero: Zero, hop: Interconnect, rounds: int) -> float:
    """Seconds of the collectives of a step on stage 3; `rounds`: micro-batches of each GPU."""
    world, trained, size = zero.world, work.trained_parameters, float(work.training.trained_bytes)
    whole = work.weight_bytes - (0.0 if zero.offload_param else work.frozen_groups)
    gathers = 1 if 2 * whole / work.training.bytes <= a.LIVE_PARAMETERS else 3 if work.checkpointing else 2
    talk = rounds * gathers * ring_seconds(whole, world, hop, passes=1, messages=len(work.shape.layers))
    talk += ring_seconds(trained * size, world, hop, passes=1, messages=_buckets(trained))
    if zero.offload_param:
        talk += rounds * gathers * whole / world / a.PCIE_BYTES
    return talk


def _update_seconds(work: Workload, zero: Zero, gpus: Collection[GPU]) -> float:
    """Seconds of the optimizer on the slowest GPU, or on the CPU where it is offloaded."""
    trained = work.trained_parameters
    own = trained if zero.stage == 0 else trained / zero.world
    if zero.offload_optimizer:
        return own / a.CPU_ADAM_PARAMETERS + own * (a.OFFLOADED_GRADIENT + work.training.trained_bytes) / a.PCIE_BYTES
    return own * a.OPTIMIZER_TRAFFIC / (min(gpu.bandwidth for gpu in gpus) * a.BANDWIDTH_SHARE)


def _buckets(parameters: float) -> int:
    """DeepSpeed's buckets of gradients for so many parameters."""
    return max(1, -int(-parameters // a.REDUCE_BUCKET))
