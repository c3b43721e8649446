"""The hardware of each worker, measured at launch: GPU, free memory, speed, node, and the links between nodes.

In: an initialised process group. Out: a HardwareProbe, the same on every worker, for the run's log and, as an
Inventory, for the planner. It takes a second or two.
"""

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from smolray.planner.assumptions import CUDA_CONTEXT, NCCL_BUFFERS
from smolray.planner.gpus import GPU
from smolray.planner.inventory import PCIE, Interconnect, Inventory, InventoryNode, find_network, measured_gpu
from smolray.pretrained import DTYPES

MEASURED_SECONDS = 0.15  # for each product, copy and transfer
SIDE = {"cpu": 768, "cuda": 4096}  # of the square matrices
COPY_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
FIRST_BYTES, MOST_BYTES = 2**20, 64 * 2**20  # of a transfer
ECHOES = 10
CPU = "CPU"  # the first word of the name of a worker without a GPU
UNMEASURED = find_network("1GbE")  # the network of a single node


class HardwareProbeError(ValueError):
    """The workers are not on the GPUs that the run was planned for. The message names both."""


@dataclass(frozen=True)
class WorkerHardware:
    """One worker. Speeds are measured while all workers compute; `memory`: bytes that are free for it."""

    node: str  # address
    node_id: str
    gpu: str
    memory: int
    tflops: float  # of a matrix product in the run's dtype
    tflops_32: float
    bandwidth: float  # bytes/s of the GPU's memory
    bf16: bool
    cpus: int  # of the node
    host_memory: int = 0  # free bytes of the node's main memory; 0: not known

    @property
    def place(self) -> str:
        """Its name in a plan (engine.gpus): node address and GPU."""
        return f"{self.node} {self.gpu}"


@dataclass(frozen=True)
class HardwareProbe:
    """Workers by rank.

    `links`: by (node number, node number), nodes numbered as they first appear; (n, n) is between two GPUs of node n.
    """

    workers: tuple[WorkerHardware, ...]
    links: dict[tuple[int, int], Interconnect]

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(w.node for w in self.workers))

    @property
    def unequal(self) -> bool:
        """Whether the GPUs are of different kinds."""
        return len({w.gpu for w in self.workers}) > 1

    def ranks(self, places: Sequence[str]) -> tuple[int, ...]:
        """The rank of the worker on each of `places` (WorkerHardware.place).

        Raises:
            HardwareProbeError: no free worker is there.
        """
        free, found = dict(enumerate(self.workers)), []
        for place in places:
            rank = next((r for r, worker in free.items() if worker.place == place), None)
            if rank is None:
                raise HardwareProbeError(
                    f"engine.gpus names {', '.join(places)}; the workers are on "
                    f"{', '.join(w.place for w in self.workers)}: "
                    "remove engine.gpus, or plan again with engine=auto"
                )
            found.append(rank)
            del free[rank]
        return tuple(found)

    def inventory(self) -> Inventory:
        """As the planner reads it: the GPUs of a node are those of its workers, in the order of their ranks."""
        nodes = []
        for number, node in enumerate(self.nodes):
            here = [w for w in self.workers if w.node == node]
            ways = [link for pair, link in self.links.items() if number in pair and pair[0] != pair[1]]
            network = max(ways, key=lambda link: link.bandwidth, default=UNMEASURED)
            internal = self.links.get((number, number), PCIE)
            nodes.append(
                InventoryNode(
                    node, tuple(map(_gpu, here)), network, internal, here[0].cpus, here[0].host_memory or None
                )
            )
        return Inventory(tuple(nodes), {pair: link for pair, link in self.links.items() if pair[0] != pair[1]})

    def rank_of(self, node: int, gpu: int) -> int:
        """The rank of the worker on a GPU of `inventory`, by its position there."""
        return [rank for rank, worker in enumerate(self.workers) if worker.node == self.nodes[node]][gpu]

    def to_json(self) -> dict[str, Any]:
        links = [{"nodes": [self.nodes[a], self.nodes[b]], **asdict(link)} for (a, b), link in self.links.items()]
        return {"workers": [asdict(w) for w in self.workers], "links": links}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "HardwareProbe":
        workers = tuple(WorkerHardware(**w) for w in record["workers"])
        nodes = list(dict.fromkeys(w.node for w in workers))
        links = {
            (nodes.index(k["nodes"][0]), nodes.index(k["nodes"][1])): Interconnect(k["bandwidth"], k["latency"])
            for k in record["links"]
        }
        return cls(workers, links)


def probe_hardware(device: torch.device, dtype: str, node: tuple[str, str]) -> HardwareProbe:
    """Measure the hardware of all workers. Collective.

    Args:
        device: of this worker.
        dtype: model.dtype of the run.
        node: (address, id) of this worker's node.
    """
    dist.barrier()  # all compute at the same time, as in training
    tflops_32, bandwidth = matmul_tflops(device, "float32"), copy_bandwidth(device)
    tflops = tflops_32 if dtype == "float32" else matmul_tflops(device, dtype)
    if device.type == "cuda":  # the memory of the measurement is freed, and does not count as the run's peak
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)

    bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    mine = WorkerHardware(
        *node,
        gpu_name(device),
        free_memory(device),
        tflops,
        tflops_32,
        bandwidth,
        bf16,
        len(os.sched_getaffinity(0)),
        psutil.virtual_memory().available,
    )
    workers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(workers, mine)

    if device.type == "cpu":  # the workers of a node share its memory
        workers = [
            WorkerHardware(**{**asdict(w), "memory": w.memory // sum(other.node == w.node for other in workers)})
            for w in workers
        ]
    return HardwareProbe(tuple(workers), measure_links([w.node for w in workers], device))


def gpu_name(device: torch.device) -> str:
    """The name that torch gives a GPU; for a CPU its model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    return f"{CPU} {model}"


def free_memory(device: torch.device) -> int:
    """Free bytes of the GPU, or of the machine."""
    return int(torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available)


def matmul_tflops(device: torch.device, dtype: str) -> float:
    """The speed of the fastest of a few products of square matrices, in 10^12 operations a second."""
    side = SIDE[device.type]
    a, out = (torch.ones(side, side, dtype=DTYPES[dtype], device=device) for _ in range(2))
    return 2 * side**3 / _fastest(lambda: torch.mm(a, a, out=out), device) / 1e12


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy in memory reads and writes."""
    size = COPY_BYTES[device.type]
    source, target = (torch.ones(size // 4, device=device) for _ in range(2))
    return 2 * size / _fastest(lambda: target.copy_(source), device)


def measure_links(nodes: Sequence[str], device: torch.device) -> dict[tuple[int, int], Interconnect]:
    """Bandwidth and latency between the first workers of every two nodes, and inside the nodes. Collective.

    Pairs without a common node are measured at the same time. `nodes`: the node of each rank.
    """
    names = list(dict.fromkeys(nodes))
    members = [[rank for rank, node in enumerate(nodes) if node == name] for name in names]
    inside = [((n, n), ranks[0], ranks[1]) for n, ranks in enumerate(members) if len(ranks) > 1]
    turns = [inside, *([((a, b), members[a][0], members[b][0]) for a, b in turn] for turn in rounds(len(names)))]
    rank, found = dist.get_rank(), dict[tuple[int, int], Interconnect]()
    for turn in turns:
        for pair, a, b in turn:
            if rank == a:
                found[pair] = _send(b, device)
            elif rank == b:
                _receive(a, device)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    return {pair: link for each in gathered for pair, link in each.items()}


def rounds(number: int) -> Iterator[list[tuple[int, int]]]:
    """Every pair of `number` players once, in rounds in which no player appears twice (the circle method)."""
    players = list(range(number + number % 2))
    for _ in range(len(players) - 1):
        half = len(players) // 2
        met = zip(players[:half], reversed(players[half:]), strict=True)
        yield [(min(pair), max(pair)) for pair in met if max(pair) < number]
        players = [players[0], players[-1], *players[1:-1]]


def _send(to: int, device: torch.device) -> Interconnect:
    """Measure the link to another rank, which runs `_receive`: echoes of one value, then a short and a long payload."""
    one = torch.zeros(1, device=device)
    echoes = []
    for _ in range(ECHOES):
        began = time.perf_counter()
        dist.send(one, to)
        dist.recv(one, to)
        one.item()
        echoes.append(time.perf_counter() - began)
    latency = min(echoes[1:]) / 2

    size = FIRST_BYTES
    for last in (False, True):
        sizes = torch.tensor([float(size)], device=device)
        dist.send(sizes, to)
        payload = torch.zeros(size // 4, device=device)
        began = time.perf_counter()
        dist.send(payload, to)
        dist.recv(one, to)
        one.item()  # all of it has arrived
        bandwidth = size / max(time.perf_counter() - began - latency, 1e-9)
        if not last:
            size = 4 * int(min(max(bandwidth * MEASURED_SECONDS, FIRST_BYTES), MOST_BYTES) / 4)
    return Interconnect(bandwidth, latency)


def _receive(source: int, device: torch.device) -> None:
    """The other side of `_send`."""
    one = torch.zeros(1, device=device)
    for _ in range(ECHOES):
        dist.recv(one, source)
        dist.send(one, source)
    for _ in range(2):
        dist.recv(one, source)
        payload = torch.zeros(int(one.item()) // 4, device=device)
        dist.recv(payload, source)
        dist.send(payload[:1].clone(), source)


def _fastest(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest repetition within MEASURED_SECONDS. The first one warms up."""
    times: list[float] = []
    while not times or sum(times) < MEASURED_SECONDS:
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)


def _gpu(worker: WorkerHardware) -> GPU:
    host = worker.gpu.startswith(CPU)
    # the planner adds the memory that this worker holds already
    memory = worker.memory + (0 if host else int(CUDA_CONTEXT + NCCL_BUFFERS))
    return measured_gpu(worker.gpu, memory, worker.tflops, worker.tflops_32, worker.bandwidth, worker.bf16, host=host)
