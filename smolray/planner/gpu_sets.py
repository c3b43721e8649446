"""Which GPUs of an inventory are worth trying together, and how pipelines may be placed on them.

In: Inventory. Out: sets of GPUs, and for each set its GPUMeshes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from smolray.planner.inventory import Inventory

Value = TypeVar("Value")
Place = tuple[int, int]  # (node, GPU of that node), by their positions in the inventory


@dataclass(frozen=True)
class GPUMesh:
    """The GPUs of one pipeline or of several replicas of it.

    `nodes`: of each node its stages, of each stage the GPUs that run it, one for each replica.
    """

    nodes: tuple[tuple[tuple[Place, ...], ...], ...]
    replicas: int

    @property
    def stages(self) -> int:
        return sum(map(len, self.nodes))


def gpu_meshes(places: Sequence[Place]) -> Iterator[GPUMesh]:
    """The ways to place pipelines on a set of GPUs.

    One pipeline over all of them. Where all nodes have the same number of GPUs, above one, also: a pipeline inside each
    node, its replicas on the other nodes; and a stage on each node, its replicas inside the node.
    """
    by_node: dict[int, list[Place]] = {}
    for place in places:
        by_node.setdefault(place[0], []).append(place)
    nodes = list(by_node.values())
    yield GPUMesh(tuple(tuple((place,) for place in node) for node in nodes), 1)

    each = len(nodes[0])
    if len(nodes) > 1 and each > 1 and all(len(node) == each for node in nodes):
        yield GPUMesh((tuple(zip(*nodes, strict=True)),), len(nodes))
        yield GPUMesh(tuple((tuple(node),) for node in nodes), each)


def gpu_sets(inventory: Inventory, places: Sequence[Place]) -> list[tuple[Place, ...]]:
    """The sets of GPUs worth trying; `places`: those that can run the run.

    All; those of each node; of the fastest nodes; the fastest GPUs; the largest GPUs; one of each kind. Of sets that
    only differ in which of several equal nodes they use, the first is kept.
    """
    gpus = {place: inventory.nodes[place[0]].gpus[place[1]] for place in places}
    own: dict[int, list[Place]] = {}
    for place in places:
        own.setdefault(place[0], []).append(place)
    speed = {n: sum(gpus[place].tflops_16 for place in here) for n, here in own.items()}
    fastest = sorted(own, key=lambda n: (-speed[n], n))

    sets = [list(places), *(own[n] for n in fastest)]
    sets += [[p for n in sorted(fastest[:count]) for p in own[n]] for count in thinned(range(2, len(fastest)))]
    for limits in ({p: gpu.tflops_16 for p, gpu in gpus.items()}, {p: gpu.memory for p, gpu in gpus.items()}):
        sets += [[p for p in places if limits[p] >= limit] for limit in thinned(sorted(set(limits.values())))]
    sets += [[place] for place in {gpu: place for place, gpu in reversed(gpus.items())}.values()]

    alike = _Interchangeable(inventory)
    unique: dict[object, tuple[Place, ...]] = {}
    for chosen in sets:
        unique.setdefault(alike.key(chosen), tuple(chosen))
    return list(unique.values())


class _Interchangeable:
    """Finds sets of GPUs that only differ in which of several equal nodes they use."""

    def __init__(self, inventory: Inventory) -> None:
        kinds: dict[object, int] = {}  # a number for each kind of GPU and of network: cheap to compare
        self.gpus = [[kinds.setdefault(gpu, len(kinds)) for gpu in node.gpus] for node in inventory.nodes]
        self.network = [kinds.setdefault(node.network, len(kinds)) for node in inventory.nodes]
        self.links = bool(inventory.links)

    def key(self, chosen: Sequence[Place]) -> object:
        """The same for sets whose nodes have equal GPUs and networks; measured links tell nodes apart."""
        if self.links and len({node for node, _ in chosen}) > 1:
            return tuple(chosen)
        by_node: dict[int, list[int]] = {}
        for node, gpu in chosen:
            by_node.setdefault(node, []).append(self.gpus[node][gpu])
        return tuple(sorted((self.network[node], *kinds) for node, kinds in by_node.items()))


def thinned(values: Sequence[Value]) -> list[Value]:
    """The first of these values, then ever fewer: each further on by an eighth of the way, and the last.

    Up to 48 values all are kept.
    """
    kept, position = list[Value](), 0
    while position < len(values) - 1:
        kept.append(values[position])
        position += max(1, position // 8) if position >= 48 else 1
    return [*kept, *values[-1:]]


def spread_over_sizes(sets: list[tuple[Place, ...]], most: int) -> list[tuple[Place, ...]]:
    """At most `most` of the sets, from the largest to the smallest."""
    by_size = sorted(sets, key=len, reverse=True)
    if len(by_size) <= most:
        return by_size
    return [by_size[round(i * (len(by_size) - 1) / (most - 1))] for i in range(most)]
