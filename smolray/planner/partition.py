"""How to partition a model into pipeline stages, and which GPU takes which stage: the smallest bottleneck that fits.

In: seconds of each layer on each kind of GPU, bytes of each range of layers, the nodes and their links. Out: a
Partition, or None where nothing fits.

Dynamic programming over the GPUs placed and the layers placed, stage by stage. The GPUs of a node stay neighbours;
nodes, and the GPUs inside a node, are tried in every order. Nodes with equal GPUs and links form a class: only the
number of them that are used matters. With too many combinations only a few orders of the nodes are tried.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

MOST_STATES = 400  # combinations of nodes and GPUs used; above it only a few orders of the nodes are tried


@dataclass(frozen=True)
class PartitionProblem:
    """L layers on P GPUs, one stage on each. Every stage holds at least one layer.

    Attributes:
        seconds: (kinds, L): forward and backward pass of a layer on a kind of GPU.
        memory: (P, L + 1, L + 1): [p, start, end] is the bytes of layers[start:end] as stage p.
        capacity: (kinds,): bytes.
        nodes: of each node the kinds of its GPUs.
        crossing: (L + 1,): bytes of a micro-batch across the boundary before a layer, one way.
        seconds_per_byte: (nodes, nodes): of the link between two nodes; on the diagonal inside a node.
    """

    seconds: np.ndarray
    memory: np.ndarray
    capacity: Sequence[float]
    nodes: tuple[tuple[int, ...], ...]
    crossing: np.ndarray
    seconds_per_byte: np.ndarray

    @property
    def layers(self) -> int:
        return self.seconds.shape[1]

    @property
    def stages(self) -> int:
        return sum(map(len, self.nodes))

    @cached_property
    def costs(self) -> np.ndarray:
        """(kinds, P, L + 1, L + 1): seconds of layers[start:end] as stage p on a kind of GPU.

        Infinite where the range is empty or does not fit.
        """
        sums = np.concatenate([np.zeros((len(self.seconds), 1)), np.cumsum(self.seconds, axis=1)], axis=1)
        seconds = sums[:, None, :] - sums[:, :, None]
        empty = np.tri(seconds.shape[1], dtype=bool)
        fits = (self.memory[None] <= np.asarray(self.capacity)[:, None, None, None]) & ~empty
        return np.where(fits, seconds[:, None], np.inf)


@dataclass(frozen=True)
class Partition:
    """A solution.

    Attributes:
        sizes: layers in each stage.
        gpus: (node, GPU of the node) of each stage.
        bottleneck: seconds of the slowest stage or link for one micro-batch.
    """

    sizes: tuple[int, ...]
    gpus: tuple[tuple[int, int], ...]
    bottleneck: float


class _State(NamedTuple):
    """Which GPUs the stages so far use."""

    used: tuple[int, ...]  # nodes used of each class
    current: int  # the class of the node in use; -1: none
    left: tuple[int, ...]  # kinds of that node's GPUs that are still free


class _Source(NamedTuple):
    """How a state was reached: from which, by a GPU of which kind, in a node of which class."""

    state: _State
    kind: int
    node_class: int


# state -> (L + 1,) the best bottleneck for each number of layers placed, and the sources of the state
_Table = dict[_State, tuple[np.ndarray, list[_Source]]]


def find_partition(problem: PartitionProblem) -> Partition | None:
    """The partition and order of GPUs with the smallest bottleneck; None where nothing that was tried fits."""
    classes = _node_classes(problem)
    inside = max(math.prod(node.count(kind) + 1 for kind in set(node)) for node in problem.nodes)
    states = math.prod(len(members) + 1 for members in classes) * len(classes) * inside
    if states <= MOST_STATES:
        return _solve(problem, classes)

    found = []
    for order in _some_orders(problem):
        partition = _solve(problem, [[node] for node in order], ordered=True)
        if partition is not None:
            found.append(partition)
    return min(found, key=lambda partition: partition.bottleneck) if found else None


def _solve(problem: PartitionProblem, classes: list[list[int]], ordered: bool = False) -> Partition | None:
    """Fill a table for each number of stages placed, then read the best partition backwards from the last one.

    `ordered`: take the nodes in the order in which they are listed.
    """
    costs = problem.costs
    start = np.full(problem.layers + 1, np.inf)
    start[0] = 0.0
    tables: list[_Table] = [{_State((0,) * len(classes), -1, ()): (start, [])}]
    for position in range(problem.stages):
        tables.append(_next_table(problem, classes, costs[:, position], tables[-1], ordered))

    ends = [(state, float(values[problem.layers])) for state, (values, _) in tables[-1].items()]
    if not ends or not np.isfinite(best := min(value for _, value in ends)):
        return None
    end = next(state for state, value in ends if value == best)
    return _read_back(problem, classes, costs, tables, end, best)


def _next_table(
    problem: PartitionProblem, classes: list[list[int]], costs: np.ndarray, table: _Table, ordered: bool
) -> _Table:
    """The table after one more stage; `costs`: (kinds, L + 1, L + 1) of that stage."""
    reached: _Table = {}
    for state, (before, _) in table.items():
        if not np.isfinite(before).any():
            continue
        for follower, kind, node_class in _followers(problem, classes, state, ordered):
            link = _link_seconds(problem, classes, state, node_class)
            values = np.maximum(np.maximum(before, link)[:, None], costs[kind]).min(axis=0)

            source = _Source(state, kind, node_class)
            if follower in reached:
                known, sources = reached[follower]
                reached[follower] = np.minimum(known, values), [*sources, source]
            else:
                reached[follower] = values, [source]
    return reached


def _read_back(
    problem: PartitionProblem,
    classes: list[list[int]],
    costs: np.ndarray,
    tables: list[_Table],
    state: _State,
    best: float,
) -> Partition:
    """The partition that reaches `state` with all layers placed: at each stage a source that gives the value."""
    end, sizes, taken = problem.layers, [], []
    for position in reversed(range(problem.stages)):
        for source, kind, node_class in tables[position + 1][state][1]:
            before = tables[position][source][0]
            link = _link_seconds(problem, classes, source, node_class)

            through = np.maximum(np.maximum(before, link), costs[kind, position, :, end])
            begin = int(np.argmin(through))
            if through[begin] <= best:
                sizes.append(end - begin)
                taken.append((node_class, kind))
                state, end = source, begin
                break
    return Partition(tuple(reversed(sizes)), _assign_gpus(problem, classes, list(reversed(taken))), best)


def _assign_gpus(
    problem: PartitionProblem, classes: list[list[int]], taken: list[tuple[int, int]]
) -> tuple[tuple[int, int], ...]:
    """(node, GPU) of each stage for the (class, kind) that the search took; each GPU is used once."""
    waiting = [list(members) for members in classes]
    gpus: list[tuple[int, int]] = []
    node, left = -1, list[int]()
    for node_class, kind in taken:
        if not left:
            node = waiting[node_class].pop(0)
            left = list(range(len(problem.nodes[node])))
        gpu = next(g for g in left if problem.nodes[node][g] == kind)
        left.remove(gpu)
        gpus.append((node, gpu))
    return tuple(gpus)


def _followers(
    problem: PartitionProblem, classes: list[list[int]], state: _State, ordered: bool
) -> list[tuple[_State, int, int]]:
    """(next state, kind of the GPU placed, class of its node): another GPU of this node, or the first of a new node."""
    used, current, left = state
    if left:
        return [(_State(used, current, _without(left, kind)), kind, current) for kind in dict.fromkeys(left)]

    found = []
    for new, members in enumerate(classes):
        if used[new] < len(members):
            counts = (*used[:new], used[new] + 1, *used[new + 1 :])
            gpus = tuple(sorted(problem.nodes[members[0]]))
            found += [(_State(counts, new, _without(gpus, kind)), kind, new) for kind in dict.fromkeys(gpus)]
            if ordered:
                break
    return found


def _link_seconds(problem: PartitionProblem, classes: list[list[int]], state: _State, node_class: int) -> np.ndarray:
    """(L + 1,): seconds that a micro-batch occupies the link from the last GPU placed to the next, in `node_class`."""
    if state.current < 0:
        return np.zeros_like(problem.crossing)
    a = classes[state.current][0]
    b = a if state.left else classes[node_class][-1]  # two nodes of one class are different nodes
    return problem.crossing * problem.seconds_per_byte[a, b]


def _node_classes(problem: PartitionProblem) -> list[list[int]]:
    """Nodes that can replace each other: they have the same GPUs, and the same links to all others."""
    found: list[list[int]] = []
    speed = problem.seconds_per_byte
    for node, gpus in enumerate(problem.nodes):
        for members in found:
            other = members[0]
            rest = [n for n in range(len(problem.nodes)) if n not in (node, other)]
            alike = sorted(problem.nodes[other]) == sorted(gpus) and speed[node, node] == speed[other, other]
            if alike and all(speed[node, n] == speed[other, n] for n in rest):
                members.append(node)
                break
        else:
            found.append([node])
    return found


def _some_orders(problem: PartitionProblem) -> list[list[int]]:
    """A few orders of many nodes: by speed and by memory, ascending and descending."""
    speed = [min(float(problem.seconds[kind].sum()) for kind in node) for node in problem.nodes]
    memory = [max(problem.capacity[kind] for kind in node) for node in problem.nodes]
    numbers = list(range(len(problem.nodes)))
    orders = [
        sorted(numbers, key=lambda n: (by[n], n), reverse=down) for by in (speed, memory) for down in (False, True)
    ]
    return [list(order) for order in dict.fromkeys(map(tuple, orders))]


def _without(gpus: tuple[int, ...], kind: int) -> tuple[int, ...]:
    at = gpus.index(kind)
    return gpus[:at] + gpus[at + 1 :]
