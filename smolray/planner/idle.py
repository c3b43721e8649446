"""What would make the GPUs pay that a plan leaves idle: a larger step, faster links, or another engine on all of them.

In: Plan. Out: Remedies, each with the speed that it would bring. Nothing is changed: a larger step also changes what a
run learns, so that a person decides.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from smolray.planner.candidate import NEARLY, Candidate
from smolray.planner.candidates import candidates_on
from smolray.planner.gpu_sets import Place
from smolray.planner.inventory import Inventory, find_network
from smolray.planner.plan import Plan, make_plan
from smolray.planner.problem import PlanningProblem

LARGER_STEPS = (2, 4, 8, 16)  # times the run's own
NETWORKS = ("10GbE", "25GbE", "100GbE")
MOST_GPUS = 64  # more are not planned once more for each remedy


@dataclass(frozen=True)
class Remedy:
    """A change after which a run would use more GPUs.

    Attributes:
        words: what to change.
        settings: the change as settings; empty where it is none of the run.
        candidate: what is chosen then.
    """

    words: str
    settings: dict[str, Any]
    candidate: Candidate


def idle_gpus(plan: Plan) -> tuple[Place, ...]:
    """The GPUs that could run the plan and that it does not use."""
    used = set(plan.chosen.gpus) if plan.chosen else set()
    nodes = plan.inventory.nodes
    places = [(n, g) for n, node in enumerate(nodes) for g in range(len(node.gpus))]
    return tuple(p for p in places if p not in used and nodes[p[0]].gpus[p[1]] not in plan.refused)


def remedies(plan: Plan) -> list[Remedy]:
    """For each kind of change, the smallest one with which the run uses more GPUs and is faster.

    Where no change of a kind does that, the largest that was tried. Last, the fastest engine on all GPUs.
    """
    if plan.chosen is None or not idle_gpus(plan) or len(plan.inventory.gpus) > MOST_GPUS:
        return []
    found = (_first(plan, _larger_steps(plan)), _first(plan, _faster_links(plan)), _on_all(plan))
    return [remedy for remedy in found if remedy is not None]


def _first(plan: Plan, tries: Iterator[tuple[str, dict[str, Any], Inventory]]) -> Remedy | None:
    """The first change that makes more GPUs pay; where none does, the last one that was tried."""
    assert plan.chosen is not None
    tried = None
    for words, settings, inventory in tries:
        chosen = make_plan(plan.config.replace(settings), plan.statistics, inventory, plan.shape).chosen
        if chosen is None:
            continue
        tried = Remedy(words, settings, chosen)
        faster = NEARLY * chosen.samples_per_second > plan.chosen.samples_per_second
        if faster and len(chosen.gpus) > len(plan.chosen.gpus):
            break
    return tried


def _larger_steps(plan: Plan) -> Iterator[tuple[str, dict[str, Any], Inventory]]:
    for times in LARGER_STEPS:
        batch = times * plan.config.global_batch
        yield f"train.global_batch={batch} ({times} times the step)", {"train.global_batch": batch}, plan.inventory


def _faster_links(plan: Plan) -> Iterator[tuple[str, dict[str, Any], Inventory]]:
    """All nodes with a network of at least such a speed."""
    inventory = plan.inventory
    pairs = [(a, b) for a in range(len(inventory.nodes)) for b in range(a)]
    slowest = min((inventory.between(a, b).bandwidth for a, b in pairs), default=float("inf"))
    for name in NETWORKS:
        network = find_network(name)
        if network.bandwidth > slowest:
            nodes = tuple(
                node if node.network.bandwidth >= network.bandwidth else replace(node, network=network)
                for node in inventory.nodes
            )
            yield f"a network of {name} between all nodes", {}, Inventory(nodes)


def _on_all(plan: Plan) -> Remedy | None:
    """The fastest engine on all GPUs, although it is no faster than what was chosen."""
    problem = PlanningProblem(plan.config, plan.shape, plan.statistics, plan.inventory)
    fitting = [candidate for candidate in candidates_on(problem, [problem.places]) if candidate.fits]
    if not fitting:
        return None
    best = max(fitting, key=lambda candidate: candidate.samples_per_second)
    return Remedy(f"{best.name} on all {len(best.gpus)} GPUs instead", {}, best)
