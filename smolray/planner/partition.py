"""Where to cut a model into pipeline stages, and which card takes which: the smallest bottleneck that memory allows.

In: seconds of each layer on each kind of card, bytes of each contiguous piece, and the boxes. Out: a Cut, or None where
nothing fits. Dynamic programming over (cards placed, layers placed); cards of a box stay adjacent, boxes and the cards
in them are tried in every order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST_STATES = 400  # boxes and cards used so far; beyond it the boxes are tried in a few orders only


@dataclass(frozen=True)
class PartitionProblem:
    """U layers on the P cards of all boxes, one stage each. Every stage holds at least one layer."""

    seconds: np.ndarray  # (kinds, U): forward and backward of a layer on a card of a kind
    memory: np.ndarray  # (P, U + 1, U + 1): bytes of layers[start:end] as stage p
    capacity: Sequence[float]  # (kinds,): bytes
    nodes: tuple[tuple[int, ...], ...]  # the kinds of the cards of each box
    crossing: np.ndarray  # (U + 1,): bytes of a micro-batch across the boundary before a layer, one way
    seconds_per_byte: np.ndarray  # (boxes, boxes): of a link; the diagonal is inside a box

    @property
    def stages(self) -> int:
        return sum(map(len, self.nodes))


@dataclass(frozen=True)
class Partition:
    """`sizes`: how many each stage holds.

    `cards`: (box, card in the box) of each stage. `bottleneck`: seconds of the slowest stage or link.
    """

    sizes: tuple[int, ...]
    gpus: tuple[tuple[int, int], ...]
    bottleneck: float


# boxes used of each sort, sort at hand (-1: none), kinds left of it
SearchState = tuple[tuple[int, ...], int, tuple[int, ...]]


def find_partition(problem: PartitionProblem) -> Partition | None:
    """The cut and order with the smallest bottleneck; None where no cut in any order tried fits into memory."""
    sorts = _sorts(problem)
    counts = [len(members) for members in sorts]
    inside = max(math.prod(node.count(kind) + 1 for kind in set(node)) for node in problem.nodes)
    if math.prod(n + 1 for n in counts) * len(sorts) * inside <= MOST_STATES:
        return _search(problem, sorts)
    found = [
        partition
        for order in _orders(problem)
        if (partition := _search(problem, [[b] for b in order], ordered=True)) is not None
    ]
    return min(found, key=lambda partition: partition.bottleneck) if found else None


def _search(problem: PartitionProblem, sorts: list[list[int]], ordered: bool = False) -> Partition | None:
    """Best bottleneck for every state and number of layers placed, card by card; then back along it.

    `ordered`: boxes as they are listed.
    """
    layers = problem.seconds.shape[1]
    costs = _costs(problem)
    start = np.full(layers + 1, np.inf)
    start[0] = 0.0
    tables: list[dict[SearchState, tuple[np.ndarray, list[tuple[SearchState, int, int]]]]] = [
        {((0,) * len(sorts), -1, ()): (start, [])}
    ]
    for position in range(problem.stages):
        table: dict[SearchState, tuple[np.ndarray, list[tuple[SearchState, int, int]]]] = {}
        for state, (before, _) in tables[-1].items():
            if not np.isfinite(before).any():
                continue
            for follower, kind, sort in _followers(problem, sorts, state, ordered):
                link = _link(problem, sorts, state, sort)
                reached = np.maximum(np.maximum(before, link)[:, None], costs[kind, position]).min(axis=0)
                known = table.get(follower)
                sources = [*known[1], (state, kind, sort)] if known else [(state, kind, sort)]
                table[follower] = (np.minimum(known[0], reached) if known else reached, sources)
        tables.append(table)
    ends = [(state, float(values[layers])) for state, (values, _) in tables[-1].items()]
    if not ends or not np.isfinite(best := min(value for _, value in ends)):
        return None
    state = next(state for state, value in ends if value == best)
    return _back(problem, sorts, costs, tables, state, best)


def _back(
    problem: PartitionProblem, sorts: list[list[int]], costs: np.ndarray, tables: list, state: SearchState, best: float
) -> Partition:
    """The cut that reaches `state` with all layers placed, found by asking each table which source gave its value."""
    end, sizes, taken = problem.seconds.shape[1], [], []
    for position in reversed(range(problem.stages)):
        for source, kind, sort in tables[position + 1][state][1]:
            before = tables[position][source][0]
            through = np.maximum(np.maximum(before, _link(problem, sorts, source, sort)), costs[kind, position, :, end])
            begin = int(np.argmin(through))
            if through[begin] <= best:
                sizes.append(end - begin)
                taken.append((sort, kind))
                state, end = source, begin
                break
    return Partition(tuple(reversed(sizes)), _gpus(problem, sorts, list(reversed(taken))), best)


def _gpus(
    problem: PartitionProblem, sorts: list[list[int]], taken: list[tuple[int, int]]
) -> tuple[tuple[int, int], ...]:
    """Real boxes and cards for the sorts and kinds on the way, each used once."""
    waiting = [list(members) for members in sorts]
    gpus: list[tuple[int, int]] = []
    node, left = -1, list[int]()
    for sort, kind in taken:
        if not left:
            node = waiting[sort].pop(0)
            left = list(range(len(problem.nodes[node])))
        gpu = next(c for c in left if problem.nodes[node][c] == kind)
        left.remove(gpu)
        gpus.append((node, gpu))
    return tuple(gpus)


def _followers(
    problem: PartitionProblem, sorts: list[list[int]], state: SearchState, ordered: bool
) -> list[tuple[SearchState, int, int]]:
    """(next state, kind of the card placed, sort of its box): a card of the box at hand, or the first card of another
    box.
    """
    used, sort, left = state
    if left:
        return [((used, sort, _without(left, kind)), kind, sort) for kind in dict.fromkeys(left)]
    found = []
    for new, members in enumerate(sorts):
        if used[new] < len(members):
            counts = (*used[:new], used[new] + 1, *used[new + 1 :])
            gpus = tuple(sorted(problem.nodes[members[0]]))
            found += [((counts, new, _without(gpus, kind)), kind, new) for kind in dict.fromkeys(gpus)]
            if ordered:
                break
    return found


def _costs(problem: PartitionProblem) -> np.ndarray:
    """(kinds, P, U + 1, U + 1): seconds of layers[start:end] as stage p on a card of a kind; infinite where it is empty
    or does not fit.
    """
    sums = np.concatenate([np.zeros((len(problem.seconds), 1)), np.cumsum(problem.seconds, axis=1)], axis=1)
    seconds = sums[:, None, :] - sums[:, :, None]
    empty = np.tri(seconds.shape[1], dtype=bool)
    fits = (problem.memory[None] <= np.asarray(problem.capacity)[:, None, None, None]) & ~empty
    return np.where(fits, seconds[:, None], np.inf)


def _link(problem: PartitionProblem, sorts: list[list[int]], state: SearchState, sort: int) -> np.ndarray:
    """(U + 1,) seconds that a micro-batch keeps the link from the card placed last to the next, which stands in a box
    of `sort`.
    """
    _, before, left = state
    if before < 0:
        return np.zeros_like(problem.crossing)
    a = sorts[before][0]
    b = a if left else sorts[sort][-1]  # of one sort: two different boxes
    return problem.crossing * problem.seconds_per_byte[a, b]


def _sorts(problem: PartitionProblem) -> list[list[int]]:
    """Boxes that can stand for each other: the same cards, and the same links to all others."""
    found: list[list[int]] = []
    speed = problem.seconds_per_byte
    for node, gpus in enumerate(problem.nodes):
        for members in found:
            other = members[0]
            rest = [b for b in range(len(problem.nodes)) if b not in (node, other)]
            alike = sorted(problem.nodes[other]) == sorted(gpus) and speed[node, node] == speed[other, other]
            if alike and all(speed[node, b] == speed[other, b] for b in rest):
                members.append(node)
                break
        else:
            found.append([node])
    return found


def _orders(problem: PartitionProblem) -> list[list[int]]:
    """A few orders of many boxes: by speed and by memory, up and down."""
    speed = [min(float(problem.seconds[k].sum()) for k in node) for node in problem.nodes]
    memory = [max(problem.capacity[k] for k in node) for node in problem.nodes]
    numbers = list(range(len(problem.nodes)))
    orders = [
        sorted(numbers, key=lambda b: (by[b], b), reverse=down) for by in (speed, memory) for down in (False, True)
    ]
    return [list(order) for order in dict.fromkeys(map(tuple, orders))]


def _without(gpus: tuple[int, ...], kind: int) -> tuple[int, ...]:
    at = gpus.index(kind)
    return gpus[:at] + gpus[at + 1 :]
