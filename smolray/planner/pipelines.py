"""Candidates that partition the model over the GPUs as a pipeline.

In: a PlanningProblem and a set of GPUs. Out: for each way to place pipelines on them the best partition, as a
Candidate.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np

from smolray.planner.candidate import NEARLY, Candidate
from smolray.planner.gpu_sets import GPUMesh, Place, gpu_meshes
from smolray.planner.gpus import GPU
from smolray.planner.inventory import Interconnect
from smolray.planner.memory import Memory, Workload, boundary_bytes, pipeline_memory, stage_memory
from smolray.planner.partition import Partition, PartitionProblem, find_partition
from smolray.planner.pipeline_time import pipeline_seconds
from smolray.planner.problem import PlanningProblem
from smolray.planner.schedule import accepted_micro_batches, in_flight
from smolray.planner.time import StepTime, data_seconds, layer_table, slowest_hop

SIZES_TRIED = 3  # the largest micro-batches of which a step has enough to fill the pipeline


@dataclass(frozen=True)
class Draft:
    """A pipeline whose schedule is not simulated yet.

    Attributes:
        candidate: with the seconds that no schedule falls below.
        seconds: simulates the schedule.
    """

    candidate: Candidate
    seconds: Callable[[], StepTime]

    def simulated(self) -> Candidate:
        """The candidate with its own seconds."""
        return replace(self.candidate, time=self.seconds())


def pipeline_candidates(problem: PlanningProblem, sets: Sequence[tuple[Place, ...]]) -> Iterator[Candidate]:
    """Pipelines on these sets of GPUs in every way of `gpu_meshes`, with a few sizes of micro-batches each.

    Those that cannot be among the fastest of their strategy are left out: to simulate a long schedule takes a while.
    """
    if not problem.allowed(name="pipeline"):
        return

    drafts: dict[str, list[Draft]] = {}
    for mesh in (mesh for places in sets for mesh in gpu_meshes(places)):
        for micro_batch in _sizes(problem, mesh):
            for mean, largest in problem.workloads(micro_batch, pipeline=True):
                draft = pipeline_draft(problem, micro_batch, mean, largest, mesh)
                if draft is not None:
                    drafts.setdefault(draft.candidate.strategy, []).append(draft)
    for found in drafts.values():
        yield from _fastest(found)


def _fastest(drafts: Sequence[Draft]) -> Iterator[Candidate]:
    """The candidates that fit and may be nearly as fast as the fastest; where none fits, the one that lacks least."""
    fitting = [draft for draft in drafts if draft.candidate.fits]
    if not fitting:
        yield min(drafts, key=lambda draft: draft.candidate.missing).simulated()

    fastest = 0.0
    for draft in sorted(fitting, key=lambda draft: -draft.candidate.samples_per_second):
        if draft.candidate.samples_per_second < NEARLY * fastest:
            return
        candidate = draft.simulated()
        fastest = max(fastest, candidate.samples_per_second)
        yield candidate


def _sizes(problem: PlanningProblem, mesh: GPUMesh) -> list[int]:
    """The largest sizes that fill the pipeline, the smallest that does, and the smallest that does not."""
    every = problem.micro_batch_sizes
    ample = [size for size in every if problem.micro_batches(problem.load(size)[0]) >= 2 * mesh.stages * mesh.replicas]
    scarce = [size for size in every if size not in ample]
    return list(dict.fromkeys(scarce[-1:] + ample[:SIZES_TRIED] + ample[-1:]))


def pipeline_draft(
    problem: PlanningProblem,
    micro_batch: int,
    mean: Workload,
    largest: Workload,
    mesh: GPUMesh,
    sizes: tuple[int, ...] | None = None,
) -> Draft | None:
    """The best partition over a mesh of GPUs.

    Where no partition fits, the fastest: it says how much memory is missing. `sizes`: a partition that is given, on
    the GPUs in their order. None: there are more stages than layers.
    """
    if mesh.stages > len(problem.shape.layers):
        return None
    schedule, replicas = problem.config.engine.schedule, mesh.replicas
    micro_batches = problem.micro_batches(mean.load)
    count = accepted_micro_batches(-(-micro_batches // replicas), mesh.stages, schedule)  # of each pipeline
    flying = [in_flight(stage, mesh.stages, count, schedule) for stage in range(mesh.stages)]
    memory, crossing = pipeline_memory(largest, flying, count), boundary_bytes(_travelling(mean, largest))

    partition = _find(problem, mean, mesh, memory, crossing) if sizes is None else _given(mesh, sizes)
    if partition is None:
        return None

    stages = [mesh.nodes[node][gpu] for node, gpu in partition.gpus]  # the GPUs of each stage, one for each replica
    places = tuple(group[replica] for replica in range(replicas) for group in stages)
    seconds = partial(
        pipeline_seconds,
        mean,
        crossing,
        partition.sizes,
        [_slowest_gpu(problem, mean, group) for group in stages],
        [_slowest_link(problem, a, b) for a, b in pairwise(stages)],
        count,
        data_seconds(mean, count * replicas, problem.cpus(stages[0])),
        replicas=replicas,
        hop=_replica_hop(problem, stages) if replicas > 1 else None,
    )
    candidate = Candidate(
        strategy="pipeline" if replicas == 1 else "pipeline x data",
        gpus=places,
        names=tuple(problem.gpu(place).name for place in places),
        micro_batch=micro_batch,
        micro_batches=count * replicas,
        checkpointing=mean.checkpointing,
        memory=_stage_memories(largest, partition.sizes, memory) * replicas,
        capacity=tuple(problem.gpu(place).usable for place in places),
        time=seconds(schedule=None),
        samples=micro_batches * mean.load.samples,
        partition=partition.sizes,
        replicas=replicas,
    )
    return Draft(candidate, partial(seconds, schedule=schedule))


def _find(
    problem: PlanningProblem, mean: Workload, mesh: GPUMesh, memory: np.ndarray, crossing: np.ndarray
) -> Partition | None:
    """The best partition that fits; where none does, the best without limits of memory."""
    groups = [[tuple(problem.gpu(place) for place in group) for group in node] for node in mesh.nodes]
    kinds = list(dict.fromkeys(group for node in groups for group in node))
    seconds = {
        gpu: [forward + backward for forward, backward in layer_table(mean, gpu)] for kind in kinds for gpu in kind
    }
    partition_problem = PartitionProblem(
        seconds=np.array([np.max([seconds[gpu] for gpu in kind], axis=0) for kind in kinds]),
        memory=memory,
        capacity=[min(gpu.usable for gpu in kind) for kind in kinds],
        nodes=tuple(tuple(kinds.index(group) for group in node) for node in groups),
        crossing=crossing,
        seconds_per_byte=_seconds_per_byte(problem, mesh),
    )
    unlimited = replace(partition_problem, capacity=[np.inf] * len(kinds))
    return find_partition(partition_problem) or find_partition(unlimited)


def _given(mesh: GPUMesh, sizes: tuple[int, ...]) -> Partition:
    gpus = tuple((node, gpu) for node, stages in enumerate(mesh.nodes) for gpu in range(len(stages)))
    return Partition(sizes, gpus, np.inf)


def _stage_memories(largest: Workload, sizes: Sequence[int], memory: np.ndarray) -> tuple[Memory, ...]:
    """The memory of each stage by part; `memory`: the table of `pipeline_memory`."""
    ends = np.cumsum(sizes).tolist()
    starts = [end - size for size, end in zip(sizes, ends, strict=True)]
    return tuple(
        stage_memory(largest, start, end, float(memory[stage, start, end]))
        for stage, (start, end) in enumerate(zip(starts, ends, strict=True))
    )


def _travelling(mean: Workload, largest: Workload) -> Workload:
    """The workload whose hidden states cross a boundary.

    All micro-batches of a step travel in the size of its largest (engine/pipeline/stage.py, Bucket). An estimate: that
    lies halfway between the mean and the largest of the epoch.
    """
    half = replace(
        mean.load,
        tiles=(mean.load.tiles + largest.load.tiles) / 2,
        tokens=(mean.load.tokens + largest.load.tokens) / 2,
    )
    return replace(mean, load=half)


def _slowest_gpu(problem: PlanningProblem, mean: Workload, group: Sequence[Place]) -> GPU:
    """The slowest GPU among the replicas of a stage."""

    def seconds(gpu: GPU) -> float:
        return sum(forward + backward for forward, backward in layer_table(mean, gpu))

    return max((problem.gpu(place) for place in group), key=seconds)


def _slowest_link(problem: PlanningProblem, a: Sequence[Place], b: Sequence[Place]) -> Interconnect:
    """The slowest link between the GPUs of two stages, replica by replica."""
    links = [problem.inventory.between(x[0], y[0]) for x, y in zip(a, b, strict=True)]
    return min(links, key=lambda link: link.bandwidth)


def _seconds_per_byte(problem: PlanningProblem, mesh: GPUMesh) -> np.ndarray:
    """(nodes, nodes) seconds a byte between stages on two nodes of a mesh; on the diagonal inside a node."""
    if mesh not in problem.seconds_per_byte:
        firsts = [node[0] for node in mesh.nodes]
        found = np.array([[1 / _slowest_link(problem, a, b).bandwidth for b in firsts] for a in firsts])
        problem.seconds_per_byte[mesh] = found
    return problem.seconds_per_byte[mesh]


def _replica_hop(problem: PlanningProblem, stages: Sequence[Sequence[Place]]) -> Interconnect:
    """The slowest hop of the rings in which the replicas of a stage add up their gradients."""
    hops = [slowest_hop(problem.inventory, [node for node, _ in group]) for group in stages]
    return min(hops, key=lambda link: link.bandwidth)
