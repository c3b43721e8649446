"""The hardware probe becomes the planner's inventory, and finds the ranks of a plan's GPUs."""

import json
from itertools import combinations

import pytest

from smolray.planner.assumptions import CUDA_CONTEXT, NCCL_BUFFERS
from smolray.planner.inventory import PCIE, Interconnect
from smolray.planner.probe import HardwareProbe, HardwareProbeError, WorkerHardware, rounds
from smolray.run.progress import event_line


def worker(node, gpu="NVIDIA GeForce RTX 3090", tflops=60.0):
    return WorkerHardware(node, f"id-{node}", gpu, 23 * 2**30, tflops, tflops / 2, 8e11, True, 16)


FOUR = HardwareProbe(
    (worker("a"), worker("a", "NVIDIA GeForce RTX 4090", 150.0), worker("b"), worker("b")),
    {(0, 0): Interconnect(2e10, 1e-5), (0, 1): Interconnect(1e8, 1e-4)},
)


@pytest.mark.parametrize("number", range(1, 10))
def test_every_pair_of_nodes_meets_once_and_no_node_twice_at_a_time(number):
    turns = list(rounds(number))
    assert sorted(pair for turn in turns for pair in turn) == list(combinations(range(number), 2))
    assert all(len({n for pair in turn for n in pair}) == 2 * len(turn) for turn in turns)


def test_a_hardware_probe_becomes_the_inventory_of_the_planner():
    inventory = FOUR.inventory()
    assert [(node.name, [gpu.name for gpu in node.gpus]) for node in inventory.nodes] == [
        ("a", ["NVIDIA GeForce RTX 3090", "NVIDIA GeForce RTX 4090"]),
        ("b", ["NVIDIA GeForce RTX 3090"] * 2),
    ]
    held = CUDA_CONTEXT + NCCL_BUFFERS  # by the worker that looked: the planner counts them once
    assert all(gpu.measured and gpu.memory == 23 * 2**30 + held for gpu in inventory.gpus)
    assert inventory.between(0, 1) == inventory.between(1, 0) == Interconnect(1e8, 1e-4)
    assert inventory.between(0, 0) == Interconnect(2e10, 1e-5) and inventory.between(1, 1) == PCIE
    assert [FOUR.rank_of(b, c) for b, c in ((0, 0), (0, 1), (1, 0), (1, 1))] == [0, 1, 2, 3]


def test_gpus_of_a_plan_are_found_among_the_workers():
    assert FOUR.ranks(["b NVIDIA GeForce RTX 3090", "a NVIDIA GeForce RTX 4090", "b NVIDIA GeForce RTX 3090"]) == (
        2,
        1,
        3,
    )
    with pytest.raises(
        HardwareProbeError,
        match=r"engine.gpus names a NVIDIA GeForce RTX 3090, a NVIDIA GeForce RTX 3090; the workers are on .*4090",
    ):
        FOUR.ranks(["a NVIDIA GeForce RTX 3090"] * 2)


def test_a_hardware_probe_survives_the_log():
    record = json.loads(json.dumps(FOUR.to_json()))
    assert HardwareProbe.from_json(record) == FOUR
    line = event_line({"event": "inventory", **record})
    assert "a: 1x NVIDIA GeForce RTX 4090 (23.0 GiB free, 150 TFLOP/s)" in line and "b: 2x" in line
    assert "a - b: 0.8 Gbit/s, 0.1 ms" in line and "inside a: 160 Gbit/s" in line
    assert FOUR.unequal and not HardwareProbe((worker("a"), worker("b")), {}).unequal
