"""Which GPUs of an inventory are worth trying together, and how pipelines may be placed on them.

In: Inventory. Out: sets of GPUs, and for each set its GPUMeshes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from smolray.planner.inventory import Inventory

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


def gpu_sets(inventory: Inventory) -> list[tuple[Place, ...]]:
    """The sets of GPUs worth trying.

    All; those of each node; of the fastest nodes; the fastest GPUs; the largest GPUs; one of each kind. Of sets that
    only differ in which of several equal nodes they use, the first is kept.
    """
    places = [(n, g) for n, node in enumerate(inventory.nodes) for g in range(len(node.gpus))]
    gpus = {place: inventory.nodes[place[0]].gpus[place[1]] for place in places}
    speed = [sum(gpu.tflops_16 for gpu in node.gpus) for node in inventory.nodes]
    fastest = sorted(range(len(speed)), key=lambda n: (-speed[n], n))

    sets = [places, *([p for p in places if p[0] == n] for n in fastest)]
    sets += [[p for p in places if p[0] in fastest[:count]] for count in range(2, len(fastest))]
    sets += [[p for p in places if gpus[p].tflops_16 >= limit] for limit in {gpu.tflops_16 for gpu in gpus.values()}]
    sets += [[p for p in places if gpus[p].memory >= limit] for limit in {gpu.memory for gpu in gpus.values()}]
    sets += [[next(p for p in places if gpus[p] == gpu)] for gpu in dict.fromkeys(gpus.values())]

    def interchangeable(chosen: Sequence[Place]) -> tuple[object, ...]:
        """The same for sets whose nodes have equal GPUs and networks; measured links tell nodes apart."""
        if inventory.links:
            return tuple(chosen)
        used = {p[0] for p in chosen}
        return tuple(
            sorted((repr([gpus[p] for p in chosen if p[0] == n]), repr(inventory.nodes[n].network)) for n in used)
        )

    unique: dict[tuple[object, ...], tuple[Place, ...]] = {}
    for chosen in sets:
        unique.setdefault(interchangeable(chosen), tuple(chosen))
    return list(unique.values())


def spread_over_sizes(sets: list[tuple[Place, ...]], most: int) -> list[tuple[Place, ...]]:
    """At most `most` of the sets, from the largest to the smallest."""
    by_size = sorted(sets, key=len, reverse=True)
    if len(by_size) <= most:
        return by_size
    return [by_size[round(i * (len(by_size) - 1) / (most - 1))] for i in range(most)]
