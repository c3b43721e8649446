"""Candidates that hold the whole model on each GPU or shard it with ZeRO.

In: a PlanningProblem and a set of GPUs. Out: a Candidate for every ZeRO stage and offload that the run may have.
"""

from collections.abc import Iterator

from smolray.config import RunConfig
from smolray.planner.candidate import Candidate
from smolray.planner.gpu_sets import Place
from smolray.planner.memory import Memory, Workload, Zero, zero_memory
from smolray.planner.problem import PlanningProblem
from smolray.planner.time import data_seconds, slowest_hop, zero_seconds


def data_parallel_candidates(
    problem: PlanningProblem,
    micro_batch: int,
    mean: Workload,
    largest: Workload,
    places: tuple[Place, ...],
    memories: dict[Zero, Memory],
) -> Iterator[Candidate]:
    """Every ZeRO stage and offload on these GPUs.

    `memories`: what was computed for this workload on other GPUs; filled here.
    """
    world, count = len(places), problem.micro_batches(mean.load)
    if world > 1 and count < world:
        return

    gpus = [problem.gpu(place) for place in places]
    hop = slowest_hop(problem.inventory, [node for node, _ in places])
    data = data_seconds(mean, count, problem.cpus(places))
    for zero in zero_choices(problem.config, world):
        if any(gpu.host for gpu in gpus) and (zero.offload_optimizer or zero.offload_param):
            continue  # a CPU has nothing to offload to
        if not problem.allowed(name="zero", stage=zero.stage, **offload_settings(zero)):
            continue

        if zero not in memories:
            memories[zero] = zero_memory(largest, zero, several=count > world)
        time, shares = zero_seconds(mean, zero, gpus, hop, count, data)
        yield Candidate(
            strategy="single" if world == 1 else f"zero-{zero.stage}",
            gpus=places,
            names=tuple(gpu.name for gpu in gpus),
            micro_batch=micro_batch,
            micro_batches=count,
            checkpointing=mean.checkpointing,
            memory=(memories[zero],) * world,
            capacity=tuple(gpu.usable for gpu in gpus),
            time=time,
            samples=count * mean.load.samples,
            zero=zero,
            shares=shares,
        )


def zero_choices(config: RunConfig, world: int) -> Iterator[Zero]:
    """The ZeRO stages and offloads worth trying on `world` GPUs.

    Stage 0 only where it keeps no second copy of the weights, or where no other stage takes the optimizer.
    """
    adapters_alone = config.lora is not None and not config.model.train
    if config.model.dtype == "float32" or adapters_alone or config.optimizer.name != "adamw":
        yield Zero(0, world)
    for stage in (1,) if world == 1 else (1, 2):
        yield Zero(stage, world)
    yield Zero(1 if world == 1 else 2, world, offload_optimizer=True)

    if world > 1:
        yield Zero(3, world)
        yield Zero(3, world, offload_optimizer=True)
    yield Zero(3, world, offload_optimizer=True, offload_param=True)


def offload_settings(zero: Zero) -> dict[str, str]:
    """The offload as settings of EngineConfig."""
    return {
        "offload_optimizer": "cpu" if zero.offload_optimizer else "none",
        "offload_param": "cpu" if zero.offload_param else "none",
    }
