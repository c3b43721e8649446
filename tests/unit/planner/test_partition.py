"""The partition that the planner finds is the one that trying everything finds."""

import itertools
import random
import time

import numpy as np
import pytest

from smolray.planner.partition import PartitionProblem, find_partition


def random_problem(rng: random.Random) -> PartitionProblem:
    layers, kinds = rng.randint(3, 7), rng.randint(1, 3)
    nodes = []
    while not nodes or (sum(map(len, nodes)) < min(layers, 4) and rng.random() < 0.8):
        nodes.append(tuple(rng.randrange(kinds) for _ in range(rng.randint(1, 2))))
    while sum(map(len, nodes)) > layers:
        nodes.pop()
    stages, count = sum(map(len, nodes)), len(nodes)
    pieces = np.array([rng.uniform(1, 10) for _ in range(layers)])
    sums = np.concatenate([[0.0], np.cumsum(pieces)])
    memory = np.stack([(sums[None, :] - sums[:, None]) * (1 + 0.3 * (stages - 1 - p)) for p in range(stages)])
    links = np.array([[rng.choice([0.1, 0.5, 2.0]) for _ in range(count)] for _ in range(count)])
    return PartitionProblem(
        seconds=np.array([[rng.uniform(1, 10) for _ in range(layers)] for _ in range(kinds)]),
        memory=memory,
        capacity=[rng.uniform(0.2, 1.2) * pieces.sum() for _ in range(kinds)],
        nodes=tuple(nodes),
        crossing=np.array([0.0, *(rng.uniform(0, 5) for _ in range(layers - 1)), 0.0]),
        seconds_per_byte=np.maximum(links, links.T),
    )


def bottleneck(problem, gpus, sizes) -> float:
    """The bottleneck of one partition on one order of GPUs by its definition; infinite where a stage does not fit."""
    slowest, start = 0.0, 0
    for position, ((node, gpu), size) in enumerate(zip(gpus, sizes, strict=True)):
        kind = problem.nodes[node][gpu]
        if problem.memory[position, start, start + size] > problem.capacity[kind]:
            return float("inf")
        slowest = max(slowest, problem.seconds[kind, start : start + size].sum())
        if position:
            slowest = max(slowest, problem.crossing[start] * problem.seconds_per_byte[gpus[position - 1][0], node])
        start += size
    return slowest


def brute_force(problem) -> float:
    layers, stages = problem.seconds.shape[1], problem.stages
    best = float("inf")
    for nodes in itertools.permutations(range(len(problem.nodes))):
        for inside in itertools.product(*(itertools.permutations(range(len(problem.nodes[b]))) for b in nodes)):
            gpus = [(b, c) for b, order in zip(nodes, inside, strict=True) for c in order]
            for partitions in itertools.combinations(range(1, layers), stages - 1):
                sizes = np.diff([0, *partitions, layers]).tolist()
                best = min(best, bottleneck(problem, gpus, sizes))
    return best


def test_the_partition_is_that_of_brute_force_on_500_random_cases():
    rng, feasible = random.Random(0), 0
    for case in range(500):
        problem = random_problem(rng)
        expected, partition = brute_force(problem), find_partition(problem)
        if partition is None:
            assert expected == float("inf"), f"case {case}: brute force found {expected}"
            continue
        feasible += 1
        assert partition.bottleneck == pytest.approx(expected, rel=1e-12), case
        assert sum(partition.sizes) == problem.seconds.shape[1] and min(partition.sizes) >= 1
        assert sorted(partition.gpus) == [(b, c) for b, node in enumerate(problem.nodes) for c in range(len(node))]
        assert bottleneck(problem, partition.gpus, partition.sizes) == pytest.approx(partition.bottleneck, rel=1e-12), (
            case
        )
    assert 150 < feasible < 450, "the cases are to hold both kinds"


def large_problem(nodes: tuple[tuple[int, ...], ...], kinds: int, layers: int = 60) -> PartitionProblem:
    rng = np.random.default_rng(0)
    sums = np.concatenate([[0.0], np.cumsum(rng.uniform(1, 2, layers))])
    memory = np.stack([sums[None, :] - sums[:, None]] * sum(map(len, nodes)))
    return PartitionProblem(
        rng.uniform(1, 2, (kinds, layers)),
        memory,
        [60.0] * kinds,
        nodes,
        rng.uniform(0, 1, layers + 1),
        np.ones((len(nodes),) * 2),
    )


def test_four_different_gpus_and_sixty_layers_take_less_than_a_second():
    problem = large_problem(((0,), (1,), (2,), (3,)), 4)
    start = time.process_time()
    assert find_partition(problem) is not None
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "nodes", [tuple((i % 4,) for i in range(16)), tuple((i,) for i in range(16)), ((0, 1, 2, 3, 4, 5, 6, 7),) * 2]
)
def test_sixteen_gpus_are_partitioned_too(nodes):
    problem = large_problem(nodes, 16)
    start = time.process_time()
    partition = find_partition(problem)
    assert partition is not None and len(partition.sizes) == 16
    assert time.process_time() - start < 1
