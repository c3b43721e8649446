"""Many GPUs are planned in seconds: the cost grows with their kinds, not with their number."""

import time
from itertools import pairwise

import pytest

from smolray.planner.gpu_sets import gpu_sets, thinned
from smolray.planner.gpus import KNOWN_GPUS
from smolray.planner.inventory import Interconnect, Inventory, InventoryNode
from tests.unit.planner.test_plan import plan_of

FAST, SLOW = Interconnect(10e9 / 8, 1e-4), Interconnect(1e9 / 8, 1e-4)
OTHERS = ("rtx3090", "rtx3060", "rtx4080", "rtx3070")


def pairs(gpus: int) -> Inventory:
    """Nodes of an rtx4090 and a GPU of another kind, on two kinds of networks."""
    nodes = [
        InventoryNode(f"n{n}", (KNOWN_GPUS["rtx4090"], KNOWN_GPUS[OTHERS[n % 4]]), (FAST, SLOW)[n % 2])
        for n in range(gpus // 2)
    ]
    return Inventory(tuple(nodes))


def eights(gpus: int) -> Inventory:
    """Nodes of eight GPUs, of which one is unequal, of another kind in every node."""
    kinds = list(KNOWN_GPUS.values())
    gpus_of = [(KNOWN_GPUS["rtx4090"],) * 7 + (kinds[n % len(kinds)],) for n in range(gpus // 8)]
    return Inventory(tuple(InventoryNode(f"n{n}", node, FAST) for n, node in enumerate(gpus_of)))


@pytest.mark.parametrize(("gpus", "seconds"), [(64, 0.8), (1000, 3)])
@pytest.mark.parametrize("inventory", [pairs, eights])
def test_many_unequal_gpus_are_planned_in_seconds(inventory, gpus, seconds):
    taken = []
    for _ in range(3):  # other processes on the same core make one try slower by half
        start = time.process_time()
        plan = plan_of(inventory(gpus), "random-500m", f"train.global_batch={4 * gpus}")
        taken.append(time.process_time() - start)
        assert plan.chosen is not None and len(plan.chosen.gpus) > 8
        if taken[-1] < seconds:
            return
    assert min(taken) < seconds


def test_of_many_nodes_ever_fewer_are_added_at_once():
    assert thinned(range(2, 50)) == list(range(2, 50))
    many = thinned(range(2, 1001))
    assert len(many) < 80 and many[-1] == 1000
    assert all(after <= max(before + 1, before * 1.2) for before, after in pairwise(many))
    many_pairs = pairs(1000)
    assert len(gpu_sets(many_pairs, [(n, g) for n in range(500) for g in range(2)])) < 100
