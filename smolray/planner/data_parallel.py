"""Candidates that hold the whole model on each GPU or shard it with ZeRO.

In: a PlanningProblem and a set of GPUs. Out: a Candidate for every ZeRO stage and offload that the run may have.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from smolray.config import RunConfig
from smolray.planner.candidate import Candidate
from smolray.planner.gpu_sets import Place
from smolray.planner.gpus import GPU
from smolray.planner.inventory import Interconnect
from smolray.planner.memory import Memory, Workload, Zero, host_bytes, zero_memory
from smolray.planner.problem import PlanningProblem
from smolray.planner.time import data_seconds, slowest_hop
from smolray.planner.zero_time import Division, divide, zero_seconds


@dataclass(frozen=True)
class GPUGroup:
    """The GPUs of a data-parallel run, and what of them is the same for every workload.

    `kind_of`, `names`, `capacity`: of each rank; the first is a number among `kinds`. `zeros`: what the run may have.
    """

    places: tuple[Place, ...]
    kinds: tuple[GPU, ...]
    kind_of: tuple[int, ...]
    names: tuple[str, ...]
    capacity: tuple[int, ...]
    zeros: tuple[Zero, ...]
    hop: Interconnect
    cpus: int
    host: float  # the least main memory of a node for each of its GPUs here; infinite where it is not known

    @classmethod
    def of(cls, problem: PlanningProblem, places: tuple[Place, ...]) -> "GPUGroup":
        """The group on these places."""
        numbers = [problem.kind_of[place] for place in places]
        present = sorted(set(numbers))
        kinds, position = tuple(problem.kinds[n] for n in present), {n: i for i, n in enumerate(present)}
        names, capacity = [gpu.name for gpu in kinds], [gpu.usable for gpu in kinds]
        kind_of = tuple(position[n] for n in numbers)
        return cls(
            places,
            kinds,
            kind_of,
            tuple(names[kind] for kind in kind_of),
            tuple(capacity[kind] for kind in kind_of),
            tuple(zero_choices(problem, kinds, len(places))),
            slowest_hop(problem.inventory, [node for node, _ in places]),
            problem.cpus(places),
            problem.host_memory(places),
        )

    @property
    def speed(self) -> tuple[object, ...]:
        """The same for groups that train equally fast."""
        return self.kinds, frozenset(Counter(self.kind_of).items()), self.hop, self.cpus, self.host


def distinct_groups(problem: PlanningProblem, sets: list[tuple[Place, ...]]) -> list[GPUGroup]:
    """The groups of these sets of GPUs; of those that train equally fast the first by its places."""
    found: dict[tuple[object, ...], GPUGroup] = {}
    for group in (GPUGroup.of(problem, places) for places in sets):
        known = found.setdefault(group.speed, group)
        if group.places < known.places:
            found[group.speed] = group
    return list(found.values())


def data_parallel_candidates(
    problem: PlanningProblem,
    micro_batch: int,
    mean: Workload,
    largest: Workload,
    group: GPUGroup,
    memories: dict[Zero, Memory],
) -> Iterator[Candidate]:
    """Every ZeRO stage and offload on these GPUs.

    `memories`: what was computed for this workload on other GPUs; filled here.
    """
    world, count = len(group.places), problem.micro_batches(mean.load)
    if world > 1 and count < world:
        return

    data, divisions = data_seconds(mean, count, group.cpus), dict[bool, Division]()
    for zero in group.zeros:
        if zero not in memories:
            memories[zero] = zero_memory(largest, zero, several=count > world)
        by_speed = zero.stage < 3
        if by_speed not in divisions:
            divisions[by_speed] = divide(mean, group.kinds, group.kind_of, count, by_speed)
        yield Candidate(
            strategy="single" if world == 1 else f"zero-{zero.stage}",
            gpus=group.places,
            names=group.names,
            micro_batch=micro_batch,
            micro_batches=count,
            checkpointing=mean.checkpointing,
            memory=(memories[zero],) * world,
            capacity=group.capacity,
            time=zero_seconds(mean, zero, group.kinds, group.hop, divisions[by_speed], data),
            samples=count * mean.load.samples,
            zero=zero,
            shares=divisions[by_speed].shares,
            host_lacks=host_bytes(largest, zero) - group.host,
        )


def zero_choices(problem: PlanningProblem, gpus: Collection[GPU], world: int) -> Iterator[Zero]:
    """The ZeRO stages and offloads that the run may have on `world` GPUs of these kinds.

    A CPU has nothing to offload to.
    """
    host = any(gpu.host for gpu in gpus)
    for zero in _worth_trying(problem.config, world):
        offloads = zero.offload_optimizer or zero.offload_param
        if not (host and offloads) and problem.allowed(name="zero", stage=zero.stage, **offload_settings(zero)):
            yield zero


def _worth_trying(config: RunConfig, world: int) -> Iterator[Zero]:
    """The ZeRO stages and offloads worth trying on `world` GPUs.

    Stage 0 only where it keeps no second copy of the weights, or where no other stage takes the optimizer.
    """
    if config.model.dtype == "float32" or config.adapters_alone or config.optimizer.name != "adamw":
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
