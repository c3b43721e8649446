"""Every way to train a run on an inventory, each with its memory and its time.

In: a PlanningProblem. Out: Candidates: which GPUs, which strategy, which micro-batch, checkpointing or not.
"""

from collections.abc import Iterator
from dataclasses import replace

from smolray.planner.candidate import Candidate
from smolray.planner.data_parallel import GPUGroup, data_parallel_candidates, distinct_groups
from smolray.planner.gpu_sets import Place, gpu_meshes, gpu_sets, spread_over_sizes
from smolray.planner.memory import Memory, Zero
from smolray.planner.pipelines import pipeline_candidates, pipeline_draft
from smolray.planner.problem import PlanningProblem

MOST_PIPELINE_SETS = 4  # sets of GPUs on which pipelines are tried


def all_candidates(problem: PlanningProblem) -> Iterator[Candidate]:
    """All of them, those that do not fit included."""
    if problem.places:
        yield from candidates_on(problem, gpu_sets(problem.inventory, problem.places))


def candidates_on(problem: PlanningProblem, sets: list[tuple[Place, ...]]) -> Iterator[Candidate]:
    """All candidates on these sets of GPUs."""
    groups = distinct_groups(problem, sets)
    for micro_batch in problem.micro_batch_sizes:
        for mean, largest in problem.workloads(micro_batch):
            memories: dict[Zero, Memory] = {}
            for group in groups:
                yield from data_parallel_candidates(problem, micro_batch, mean, largest, group, memories)

    pipelines = [places for places in sets if 2 <= len(places) <= len(problem.shape.layers)]
    yield from pipeline_candidates(problem, spread_over_sizes(pipelines, MOST_PIPELINE_SETS))


def candidate_as_written(problem: PlanningProblem) -> Candidate | None:
    """The run as its settings say, on the fastest GPUs, one for each of its workers.

    The stages of a pipeline are on those GPUs in the order of the inventory. None: the planner knows no such strategy,
    or no GPU can run it.
    """
    config = problem.config
    size = config.train.per_device_train_batch_size
    places = _fastest(problem, config.resources.workers[1])
    if not places:
        return None
    written = replace(problem, sizes=(size,), checkpointing=(config.model.gradient_checkpointing,))
    mean, largest = written.workloads(size, config.engine.name == "pipeline")[0]

    if config.engine.name == "pipeline":
        stages = config.engine.pipeline_stages
        mesh = next((mesh for mesh in gpu_meshes(places) if stages in (None, mesh.stages)), None)
        draft = pipeline_draft(written, size, mean, largest, mesh, config.engine.partition) if mesh else None
        return draft.simulated() if draft else None
    if config.engine.name == "zero":
        found = data_parallel_candidates(written, size, mean, largest, GPUGroup.of(written, places), {})
        return next((candidate for candidate in found if _has_engine_of(candidate, problem)), None)
    return None


def _fastest(problem: PlanningProblem, workers: int) -> tuple[Place, ...]:
    """The fastest GPUs, at most `workers`, in the order of the inventory."""
    return tuple(sorted(sorted(problem.places, key=lambda place: -problem.gpu(place).tflops_16)[:workers]))


def _has_engine_of(candidate: Candidate, problem: PlanningProblem) -> bool:
    """Whether a data-parallel candidate has the ZeRO stage and the offload of the run."""
    engine, stage, zero = problem.config.engine, problem.config.zero_stage, candidate.zero
    if zero is None:
        return False
    offload = (engine.offload_optimizer == "cpu", engine.offload_param == "cpu")
    # on one GPU stages 0, 1 and 2 shard nothing
    same_stage = zero.stage == stage or (len(candidate.gpus) == 1 and {zero.stage, stage} <= {0, 1, 2})
    return same_stage and (zero.offload_optimizer, zero.offload_param) == offload
