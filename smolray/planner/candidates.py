"""Every way to train a run on an inventory, each with its memory and its time.

In: RunConfig, DataStatistics, ModelShape, Inventory. Out: Candidates: which cards, which strategy, which micro-batch,
checkpointing or not.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from smolray.config import RunConfig
from smolray.config.rules import faults
from smolray.planner.inventory import GPU, Interconnect, Inventory
from smolray.planner.memory import Memory, Workload, Zero, boundary_bytes, pipeline_memory, stage_memory, zero_memory
from smolray.planner.partition import Partition, PartitionProblem, find_partition
from smolray.planner.schedule import Schedule, accepted_micro_batches, in_flight
from smolray.planner.shapes import ModelShape, Training, left_out
from smolray.planner.statistics import DataStatistics, Load
from smolray.planner.time import StepTime, data_seconds, layer_table, pipeline_seconds, slowest_hop, zero_seconds

Place = tuple[int, int]  # (box, card in the box)
MOST_PIPELINE_SETS, MICRO_BATCHES_IN_PIPELINE = 4, 3
STEP_MAY_DIFFER = 0.05  # of the conversations in an optimizer step, for a micro-batch of another size


@dataclass(frozen=True)
class Candidate:
    """One way to train.

    `cards`: of each rank, or of each stage (replica after replica). `micro_batch`: conversations at most.
    """

    strategy: str  # single, zero-0 … zero-3, pipeline, pipeline x data
    gpus: tuple[Place, ...]
    names: tuple[str, ...]
    micro_batch: int
    micro_batches: int  # of an optimizer step, over all workers
    checkpointing: bool | int
    memory: tuple[Memory, ...]
    capacity: tuple[int, ...]
    time: StepTime
    samples: float  # conversations in a step, on average
    zero: Zero | None = None
    shares: tuple[int, ...] = ()  # micro-batches dealt to each rank
    partition: tuple[int, ...] = ()  # layers of each stage
    replicas: int = 1

    @property
    def missing(self) -> float:
        """Bytes by which the fullest card is too small; at most 0: it fits."""
        return max(m.total - c for m, c in zip(self.memory, self.capacity, strict=True))

    @property
    def fits(self) -> bool:
        return self.missing <= 0

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.time.total

    @property
    def name(self) -> str:
        """The strategy with what is offloaded."""
        zero = self.zero
        return self.strategy + (
            ", weights offloaded"
            if zero and zero.offload_param
            else ", optimizer offloaded"
            if zero and zero.offload_optimizer
            else ""
        )

    @property
    def limit(self) -> str:
        """What limits it: the part of memory that does not fit, or the part of the step that takes longest."""
        if self.fits:
            return self.time.limit
        tight = max(range(len(self.memory)), key=lambda i: self.memory[i].total - self.capacity[i])
        return f"{self.names[tight]} lacks {max(self.missing / 1e9, 0.1):.1f} GB ({self.memory[tight].largest})"


@dataclass(frozen=True)
class CandidateGenerator:
    """The settings of one enumeration. `sizes` of micro-batches, `checkpointing`: the choices; None: the planner's own."""

    config: RunConfig
    shape: ModelShape
    statistics: DataStatistics
    inventory: Inventory
    sizes: tuple[int, ...] | None = None
    checkpointing: tuple[bool | int, ...] | None = None
    _allowed: dict[tuple[tuple[str, object], ...], bool] = field(default_factory=dict, init=False)
    _loads: dict[int, tuple[Load, Load]] = field(default_factory=dict, init=False)
    _workloads: dict[int, list[tuple[Workload, Workload]]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", replace(self.shape, left_out=left_out(self.config)))

    def load(self, micro_batch: int) -> tuple[Load, Load]:
        """(mean, largest) micro-batch."""
        if micro_batch not in self._loads:
            self._loads[micro_batch] = self.statistics.loads(self.config, micro_batch)
        return self._loads[micro_batch]

    @cached_property
    def samples(self) -> float:
        """Conversations in an optimizer step as the run is written: what no plan changes."""
        return self.config.global_batch * self.load(self.config.train.per_device_train_batch_size)[0].samples

    @cached_property
    def micro_batch_sizes(self) -> tuple[int, ...]:
        """The run's own size, others twice or half as large, and whole images' worth, as far as they keep the step's
        number of conversations.
        """
        own, image = self.config.train.per_device_train_batch_size, max(1, round(self.statistics.questions_per_row))
        tried = (
            {own} | {own >> n for n in range(1, 8) if own >> n} | {own << 1, own << 2} | {image << n for n in range(4)}
        )
        if self.sizes is not None:
            return self.sizes
        kept = {
            b
            for b in tried
            if b <= self.samples and abs(self.samples - self.conversations(b)) <= STEP_MAY_DIFFER * self.samples
        }
        return tuple(sorted({1, own, *kept}, reverse=True))

    def conversations(self, micro_batch: int) -> float:
        """Of a step of whole micro-batches of this size, on average."""
        mean = self.load(micro_batch)[0]
        return self.count(mean) * mean.samples

    def workloads(self, micro_batch: int) -> list[tuple[Workload, Workload]]:
        """(of the mean, of the largest micro-batch) with each choice of checkpointing."""
        if micro_batch in self._workloads:
            return self._workloads[micro_batch]
        config, found = self.config, []
        retrieval = config.method == "retrieval"
        # no logits
        mean, largest = (replace(load, label_tokens=0) if retrieval else load for load in self.load(micro_batch))
        own = config.model.gradient_checkpointing
        reference = config.method == "dpo" and config.dpo.reference != "precompute"
        copy = reference and (config.dpo.reference == "copy" or config.lora is None or bool(config.model.train))
        for checkpointing in self.checkpointing or tuple(dict.fromkeys((False, True, own))):
            work = Workload(
                self.shape, Training.of(config), mean, checkpointing, config.optimizer.name, copy, reference, retrieval
            )
            found.append((work, replace(work, load=largest)))
        self._workloads[micro_batch] = found
        return found

    def count(self, mean: Load) -> int:
        """Micro-batches of a step."""
        return max(1, round(self.samples / mean.samples))

    def allowed(self, **engine: object) -> bool:
        """Whether the run may have such an engine (config_rules.py)."""
        key = tuple(engine.items())
        if key not in self._allowed:
            settings = {"gpus": None, "partition": None, **engine}
            told = faults(self.config.replace({f"engine.{name}": value for name, value in settings.items()}))
            self._allowed[key] = not any("engine" in fault for fault in told)
        return self._allowed[key]

    def gpu(self, place: Place) -> GPU:
        return self.inventory.nodes[place[0]].gpus[place[1]]

    def candidates(self) -> Iterator[Candidate]:
        """All of them, those that do not fit included."""
        sets = gpu_sets(self.inventory)
        for micro_batch in self.micro_batch_sizes:
            for mean, largest in self.workloads(micro_batch):
                known: dict[Zero, Memory] = {}
                for places in sets:
                    yield from self.data_parallel(micro_batch, mean, largest, places, known)
        pipelines = [places for places in sets if 2 <= len(places) <= len(self.shape.layers)]
        for places in _spread(sorted(pipelines, key=len, reverse=True), MOST_PIPELINE_SETS):
            yield from self.pipelines(places)

    def data_parallel(
        self, micro_batch: int, mean: Workload, largest: Workload, places: tuple[Place, ...], known: dict[Zero, Memory]
    ) -> Iterator[Candidate]:
        """Every ZeRO stage and offload on these cards."""
        world, count = len(places), self.count(mean.load)
        if world > 1 and count < world:
            return
        gpus = [self.gpu(p) for p in places]
        hop = slowest_hop(self.inventory, [node for node, _ in places])
        cores = sum(self.inventory.nodes[node].cpus for node in {node for node, _ in places})
        data = data_seconds(mean, count, cores)
        for zero in zero_choices(self.config, world):
            offloads = zero.offload_optimizer or zero.offload_param
            if not self.allowed(name="zero", stage=zero.stage, **offload_settings(zero)) or (
                offloads and any(gpu.host for gpu in gpus)
            ):
                continue
            if (memory := known.get(zero)) is None:
                memory = known[zero] = zero_memory(largest, zero, several=count > world)
            time, shares = zero_seconds(mean, zero, gpus, hop, count, data)
            yield Candidate(
                "single" if world == 1 else f"zero-{zero.stage}",
                places,
                tuple(c.name for c in gpus),
                micro_batch,
                count,
                mean.checkpointing,
                (memory,) * world,
                tuple(c.usable for c in gpus),
                time,
                count * mean.load.samples,
                zero,
                shares,
            )

    def pipelines(self, places: tuple[Place, ...]) -> Iterator[Candidate]:
        """One stage on each card, and, where boxes are alike in number of cards, replicas by box or inside boxes."""
        if not self.allowed(name="pipeline"):
            return
        for mesh in gpu_meshes(places):
            stages = sum(map(len, mesh.nodes))
            sizes = [b for b in self.micro_batch_sizes if self.count(self.load(b)[0]) >= mesh.replicas * 2]
            ample = [b for b in sizes if self.count(self.load(b)[0]) >= 2 * stages * mesh.replicas]
            tried = (
                [b for b in self.micro_batch_sizes if b not in ample][-1:]
                + ample[:MICRO_BATCHES_IN_PIPELINE]
                + ample[-1:]
            )
            for micro_batch in dict.fromkeys(tried or self.micro_batch_sizes[-1:]):
                for mean, largest in self.workloads(micro_batch):
                    if (found := self.pipeline(micro_batch, mean, largest, mesh)) is not None:
                        yield found

    def pipeline(
        self, micro_batch: int, mean: Workload, largest: Workload, mesh: "GPUMesh", given: tuple[int, ...] | None = None
    ) -> Candidate | None:
        """The best cut over a mesh of cards; where none fits, the cut by time alone, which says what is missing.

        `given`: a cut, on the cards in order.
        """
        schedule: Schedule = self.config.engine.schedule
        count = -(-self.count(mean.load) // mesh.replicas)
        stages = sum(map(len, mesh.nodes))
        count = accepted_micro_batches(count, stages, schedule)
        flying = [in_flight(p, stages, count, schedule) for p in range(stages)]
        groups = [[self.gpu(p) for p in group] for node in mesh.nodes for group in node]
        kinds = list(dict.fromkeys(tuple(group) for group in groups))
        tables = {gpu: [f + b for f, b in layer_table(mean, gpu)] for group in kinds for gpu in group}
        memory = pipeline_memory(largest, flying, count)
        problem = PartitionProblem(
            seconds=np.array([np.max([tables[gpu] for gpu in group], axis=0) for group in kinds]),
            memory=memory,
            capacity=[min(gpu.usable for gpu in group) for group in kinds],
            nodes=tuple(tuple(kinds.index(tuple(self.gpu(p) for p in group)) for group in node) for node in mesh.nodes),
            crossing=boundary_bytes(self.travelling(mean, largest)),
            seconds_per_byte=self._seconds_per_byte(mesh),
        )
        if given is not None:
            partition: Partition | None = Partition(
                given, tuple((b, c) for b, node in enumerate(mesh.nodes) for c in range(len(node))), np.inf
            )
        else:
            partition = find_partition(problem) or find_partition(replace(problem, capacity=[np.inf] * len(kinds)))
        if partition is None:
            return None
        chain = [mesh.nodes[node][gpu] for node, gpu in partition.gpus]
        slow = [max((self.gpu(p) for p in group), key=lambda c: sum(tables[c])) for group in chain]
        links = [self._slowest(a, b) for a, b in pairwise(chain)]
        hops = (
            [slowest_hop(self.inventory, [node for node, _ in group]) for group in chain] if mesh.replicas > 1 else []
        )
        hop = min(hops, key=lambda link: link.bandwidth) if hops else None
        cores = sum(self.inventory.nodes[node].cpus for node in {node for node, _ in chain[0]})
        data = data_seconds(mean, count * mesh.replicas, cores)
        time = pipeline_seconds(
            mean,
            boundary_bytes(self.travelling(mean, largest)),
            partition.sizes,
            slow,
            links,
            count,
            data,
            schedule,
            mesh.replicas,
            hop,
        )
        ends = np.cumsum(partition.sizes).tolist()
        starts = [end - size for size, end in zip(partition.sizes, ends, strict=True)]
        parts = [
            stage_memory(largest, a, b, float(memory[p, a, b]))
            for p, (a, b) in enumerate(zip(starts, ends, strict=True))
        ]
        places = tuple(chain[s][r] for r in range(mesh.replicas) for s in range(stages))
        return Candidate(
            "pipeline" if mesh.replicas == 1 else "pipeline x data",
            places,
            tuple(self.gpu(p).name for p in places),
            micro_batch,
            count * mesh.replicas,
            mean.checkpointing,
            tuple(parts) * mesh.replicas,
            tuple(self.gpu(p).usable for p in places),
            time,
            self.count(mean.load) * mean.load.samples,
            partition=partition.sizes,
            replicas=mesh.replicas,
        )

    @staticmethod
    def travelling(mean: Workload, largest: Workload) -> Workload:
        """What crosses a boundary: all micro-batches of a step in the size of its largest, taken to lie halfway between
        the mean and the epoch's largest.
        """
        half = replace(
            mean.load,
            tiles=(mean.load.tiles + largest.load.tiles) / 2,
            tokens=(mean.load.tokens + largest.load.tokens) / 2,
        )
        return replace(mean, load=half)

    def _seconds_per_byte(self, mesh: "GPUMesh") -> np.ndarray:
        firsts = [node[0] for node in mesh.nodes]
        return np.array([[1 / self._slowest(a, b, inside=a is b).bandwidth for b in firsts] for a in firsts])

    def _slowest(self, a: Sequence[Place], b: Sequence[Place], inside: bool = False) -> Interconnect:
        """Of the links between the cards of two stages, replica by replica."""
        links = [self.inventory.between(x[0], x[0] if inside else y[0]) for x, y in zip(a, b, strict=True)]
        return min(links, key=lambda link: link.bandwidth)


@dataclass(frozen=True)
class GPUMesh:
    """Cards as a mesh: boxes of groups, a group being the replicas of one stage."""

    nodes: tuple[tuple[tuple[Place, ...], ...], ...]
    replicas: int


def gpu_meshes(places: Sequence[Place]) -> Iterator[GPUMesh]:
    """One long pipeline; a pipeline in each box with replicas over boxes; a stage a box with replicas inside it."""
    by_node: dict[int, list[Place]] = {}
    for place in places:
        by_node.setdefault(place[0], []).append(place)
    nodes = list(by_node.values())
    yield GPUMesh(tuple(tuple((place,) for place in node) for node in nodes), 1)
    each = len(nodes[0])
    if len(nodes) > 1 and each > 1 and all(len(node) == each for node in nodes):
        yield GPUMesh((tuple(zip(*nodes, strict=True)),), len(nodes))
        yield GPUMesh(tuple((tuple(node),) for node in nodes), each)


def zero_choices(config: RunConfig, world: int) -> Iterator[Zero]:
    """The ZeRO stages and offloads worth trying. Stage 0 where it keeps no copy of the weights, or is the only one."""
    adapters_alone = config.lora is not None and not config.model.train
    if config.model.dtype == "float32" or adapters_alone or config.optimizer.name != "adamw":
        yield Zero(0, world)
    for stage in (1,) if world == 1 else (1, 2):
        yield Zero(stage, world)
    yield Zero(1 if world == 1 else 2, world, offload_optimizer=True)
    if world > 1:
        yield Zero(3, world)
        yield Zero(3, world, offload_optimizer=True)
    yield Zero(3, world, offload_optimizer=True, offload_param=True)


def offload_settings(zero: Zero) -> dict[str, str]:
    """As EngineConfig spells them."""
    return {
        "offload_optimizer": "cpu" if zero.offload_optimizer else "none",
        "offload_param": "cpu" if zero.offload_param else "none",
    }


def gpu_sets(inventory: Inventory) -> list[tuple[Place, ...]]:
    """Cards worth trying together: all; each box; the fastest boxes; the fastest and the largest cards; each kind
    alone.
    """
    places = [(b, c) for b, node in enumerate(inventory.nodes) for c in range(len(node.gpus))]
    gpus = {place: inventory.nodes[place[0]].gpus[place[1]] for place in places}
    speed = [sum(gpu.tflops_16 for gpu in node.gpus) for node in inventory.nodes]
    fastest = sorted(range(len(speed)), key=lambda b: (-speed[b], b))
    sets = [places, *([p for p in places if p[0] == b] for b in fastest)]
    sets += [[p for p in places if p[0] in fastest[:n]] for n in range(2, len(fastest))]
    sets += [[p for p in places if gpus[p].tflops_16 >= limit] for limit in {gpu.tflops_16 for gpu in gpus.values()}]
    sets += [[p for p in places if gpus[p].memory >= limit] for limit in {gpu.memory for gpu in gpus.values()}]
    sets += [[next(p for p in places if gpus[p] == gpu)] for gpu in dict.fromkeys(gpus.values())]
    unique: dict[tuple[object, ...], tuple[Place, ...]] = {}
    for chosen in sets:
        # Boxes with the same cards and network stand for each other.
        key = tuple(
            sorted(
                (repr([gpus[p] for p in chosen if p[0] == b]), repr(inventory.nodes[b].network))
                for b in {p[0] for p in chosen}
            )
        )
        unique.setdefault(key if not inventory.links else tuple(chosen), tuple(chosen))
    return list(unique.values())


def _spread(sets: list[tuple[Place, ...]], most: int) -> list[tuple[Place, ...]]:
    """At most so many, from the largest to the smallest."""
    if len(sets) <= most:
        return sets
    return [sets[round(i * (len(sets) - 1) / (most - 1))] for i in range(most)]
