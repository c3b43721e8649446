"""The cut that the planner finds is the one that trying everything finds."""

import itertools
import random
import time

import numpy as np
import pytest

from smolray.planner.cut import CutProblem, find_cut


def random_problem(rng: random.Random) -> CutProblem:
    units, kinds = rng.randint(3, 7), rng.randint(1, 3)
    boxes = []
    while not boxes or (sum(map(len, boxes)) < min(units, 4) and rng.random() < 0.8):
        boxes.append(tuple(rng.randrange(kinds) for _ in range(rng.randint(1, 2))))
    while sum(map(len, boxes)) > units:
        boxes.pop()
    stages, count = sum(map(len, boxes)), len(boxes)
    pieces = np.array([rng.uniform(1, 10) for _ in range(units)])
    sums = np.concatenate([[0.0], np.cumsum(pieces)])
    memory = np.stack([(sums[None, :] - sums[:, None]) * (1 + 0.3 * (stages - 1 - p)) for p in range(stages)])
    links = np.array([[rng.choice([0.1, 0.5, 2.0]) for _ in range(count)] for _ in range(count)])
    return CutProblem(
        seconds=np.array([[rng.uniform(1, 10) for _ in range(units)] for _ in range(kinds)]),
        memory=memory,
        capacity=[rng.uniform(0.2, 1.2) * pieces.sum() for _ in range(kinds)],
        boxes=tuple(boxes),
        crossing=np.array([0.0, *(rng.uniform(0, 5) for _ in range(units - 1)), 0.0]),
        seconds_per_byte=np.maximum(links, links.T),
    )


def bottleneck(problem, cards, sizes) -> float:
    """Of one cut on one order of cards, infinite where a stage does not fit: the definition, spelt out."""
    slowest, start = 0.0, 0
    for position, ((box, card), size) in enumerate(zip(cards, sizes, strict=True)):
        kind = problem.boxes[box][card]
        if problem.memory[position, start, start + size] > problem.capacity[kind]:
            return float("inf")
        slowest = max(slowest, problem.seconds[kind, start : start + size].sum())
        if position:
            slowest = max(slowest, problem.crossing[start] * problem.seconds_per_byte[cards[position - 1][0], box])
        start += size
    return slowest


def brute_force(problem) -> float:
    units, stages = problem.seconds.shape[1], problem.stages
    best = float("inf")
    for boxes in itertools.permutations(range(len(problem.boxes))):
        for inside in itertools.product(*(itertools.permutations(range(len(problem.boxes[b]))) for b in boxes)):
            cards = [(b, c) for b, order in zip(boxes, inside, strict=True) for c in order]
            for cuts in itertools.combinations(range(1, units), stages - 1):
                sizes = np.diff([0, *cuts, units]).tolist()
                best = min(best, bottleneck(problem, cards, sizes))
    return best


def test_the_cut_is_that_of_brute_force_on_500_random_cases():
    rng, feasible = random.Random(0), 0
    for case in range(500):
        problem = random_problem(rng)
        expected, cut = brute_force(problem), find_cut(problem)
        if cut is None:
            assert expected == float("inf"), f"case {case}: brute force found {expected}"
            continue
        feasible += 1
        assert cut.bottleneck == pytest.approx(expected, rel=1e-12), case
        assert sum(cut.units) == problem.seconds.shape[1] and min(cut.units) >= 1
        assert sorted(cut.cards) == [(b, c) for b, box in enumerate(problem.boxes) for c in range(len(box))]
        assert bottleneck(problem, cut.cards, cut.units) == pytest.approx(cut.bottleneck, rel=1e-12), case
    assert 150 < feasible < 450, "the cases are to hold both kinds"


def large_problem(boxes: tuple[tuple[int, ...], ...], kinds: int, units: int = 60) -> CutProblem:
    rng = np.random.default_rng(0)
    sums = np.concatenate([[0.0], np.cumsum(rng.uniform(1, 2, units))])
    memory = np.stack([sums[None, :] - sums[:, None]] * sum(map(len, boxes)))
    return CutProblem(
        rng.uniform(1, 2, (kinds, units)),
        memory,
        [60.0] * kinds,
        boxes,
        rng.uniform(0, 1, units + 1),
        np.ones((len(boxes),) * 2),
    )


def test_four_different_cards_and_sixty_units_take_less_than_a_second():
    problem = large_problem(((0,), (1,), (2,), (3,)), 4)
    start = time.process_time()
    assert find_cut(problem) is not None
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "boxes", [tuple((i % 4,) for i in range(16)), tuple((i,) for i in range(16)), ((0, 1, 2, 3, 4, 5, 6, 7),) * 2]
)
def test_sixteen_cards_are_cut_too(boxes):
    problem = large_problem(boxes, 16)
    start = time.process_time()
    cut = find_cut(problem)
    assert cut is not None and len(cut.units) == 16
    assert time.process_time() - start < 1
