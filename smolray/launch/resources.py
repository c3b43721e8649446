"""What a run asks of a cluster, compared with what the cluster has, before anything starts.

In: a RunConfig and what Ray counts. Out: the number of workers where it is `auto`; nothing, or ResourcesError with the
nearest setting that works.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import ray

from smolray.config import ConfigError, RunConfig
from smolray.data.ray_context import cluster_capacity, startable_nodes

SLACK = 1e-9  # fractions of CPUs add up to a little more than their sum


@dataclass(frozen=True)
class NodeResources:
    """One living Ray node: `resources` as Ray counts them (CPU, GPU, accelerator_type:X), and its labels."""

    resources: Mapping[str, float]
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Cluster:
    """What a run may be placed on, nodes that an autoscaler has still to start included. `available`: their sum."""

    available: dict[str, float]
    nodes: tuple[NodeResources, ...]

    @classmethod
    def connected(cls) -> "Cluster":
        """The cluster that this process is connected to, with the nodes that its autoscaler has still to start."""
        living = [NodeResources(n["Resources"], n["Labels"]) for n in ray.nodes() if n["Alive"]]
        up, coming = Counter(_shape(node.resources) for node in living), []
        for resources in startable_nodes():
            if up[_shape(resources)]:
                up[_shape(resources)] -= 1
            else:
                coming.append(NodeResources(resources, {}))
        return cls(cluster_capacity(), (*living, *coming))


class ResourcesError(ConfigError):
    """The cluster lacks what the run asks for; the message names the request, what is there, and what works."""


def _shape(resources: Mapping[str, float]) -> tuple[float, float]:
    return float(resources.get("CPU", 0)), float(resources.get("GPU", 0))


def use_gpu(config: RunConfig, available: Mapping[str, float]) -> bool:
    """Whether the run's workers take GPUs on a cluster that has these resources."""
    return config.resources.use_gpu == "yes" or (config.resources.use_gpu == "auto" and available.get("GPU", 0) > 0)


def worker_resources(config: RunConfig, gpu: bool) -> dict[str, float]:
    """What one worker takes, by Ray's names."""
    resources = config.resources
    return {"CPU": resources.cpus_per_worker} | ({"GPU": resources.gpus_per_worker} if gpu else {})


def count_workers(config: RunConfig, cluster: Cluster, global_batch: int | None) -> tuple[int, str]:
    """The number of workers for `resources.num_workers: auto`, and why there are so many.

    All GPUs that are there, as far as CPUs and `global_batch` reach (None: the batch follows from the workers); one
    worker where no GPU is used.
    """
    resources = config.resources
    if not use_gpu(config, cluster.available):
        none = "no GPU is there" if resources.use_gpu == "auto" else f"resources.use_gpu = {resources.use_gpu}"
        return 1, f"1 worker: {none}"
    if resources.gpus_per_worker < 1:
        return 1, f"1 worker: resources.gpus_per_worker = {resources.gpus_per_worker:g}, and two cannot share a GPU"

    nodes = [node for node in cluster.nodes if resources.label_selector.items() <= node.labels.items()]
    gpus = sum(int(node.resources.get("GPU", 0)) for node in nodes)
    by_gpu = sum(_times(node.resources.get("GPU", 0), resources.gpus_per_worker) for node in nodes)

    each = f"{resources.cpus_per_worker:g} CPU, and {config.data.num_cpus_per_task:g} CPU for its data tasks"
    limits = [
        (by_gpu, "one for each GPU" if resources.gpus_per_worker == 1 else f"{resources.gpus_per_worker:g} GPUs each"),
        (sum(places(config, node, True) for node in nodes), f"the CPUs are enough for no more ({each})"),
    ]

    if global_batch is not None and config.engine.name in ("zero", "trl"):
        limits.append((global_batch, f"a step has {global_batch} micro-batches (train.global_batch)"))
    most, why = min(limits, key=lambda limit: limit[0])

    workers = max(1, _whole(config, most, global_batch))
    if workers < most:
        why = f"of {most}, the largest number that divides train.global_batch = {global_batch}"
        if config.engine.name == "pipeline":
            why = f"whole pipelines of {_stages(config)} stages"
    return workers, f"{_count(workers, 'worker')} for {_count(gpus, 'GPU')}: {why}"


def _whole(config: RunConfig, most: int, global_batch: int | None) -> int:
    """At most `most` workers, as the engine needs them."""
    if config.engine.name == "trl" and global_batch is not None:  # each worker takes the same number of micro-batches
        return max((n for n in range(1, most + 1) if global_batch % n == 0), default=1)
    if config.engine.name == "pipeline" and (stages := _stages(config)):
        return max(most // stages * stages, stages)
    return most


def _stages(config: RunConfig) -> int:
    """The number of pipeline stages where the run names it, else 0."""
    return config.engine.pipeline_stages or len(config.engine.partition or ())


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _times(amount: float, each: float) -> int:
    return int(amount / each + SLACK)


def places(config: RunConfig, node: NodeResources, gpu: bool) -> int:
    """Workers that have room on a node, a data task for each included."""
    resources = config.resources
    by_cpu = _times(node.resources.get("CPU", 0), resources.cpus_per_worker + config.data.num_cpus_per_task)
    return min(by_cpu, _times(node.resources.get("GPU", 0), resources.gpus_per_worker)) if gpu else by_cpu


def check_resources(config: RunConfig, available: dict[str, float]) -> None:
    """Raise ResourcesError where the smallest worker group cannot start, or leaves no CPU for its data tasks."""
    wanted, task = config.resources.workers[0], config.data.num_cpus_per_task
    cpus, gpus, each = available.get("CPU", 0), available.get("GPU", 0), config.resources.cpus_per_worker
    if use_gpu(config, available) and wanted * config.resources.gpus_per_worker > gpus:
        fits = int(gpus // config.resources.gpus_per_worker)
        nearest = f"resources.num_workers={fits}" if fits else "resources.use_gpu=no"
        raise ResourcesError(
            f"asked for {wanted} workers x {config.resources.gpus_per_worker:g} GPU, the cluster has {gpus:g} GPU "
            f"({_gpus(available)}); nearest: {nearest}"
        )

    # An elastic group grows as far as the CPUs reach; its data tasks must still find some then.
    room = [config.resources.workers[1], *([int(cpus // each)] if each else [])]
    room += [int(gpus // config.resources.gpus_per_worker)] if use_gpu(config, available) else []
    largest = max(wanted, min(room))

    if largest * (each + task) > cpus + SLACK:
        up_to = "up to " if largest > wanted else ""
        raise ResourcesError(
            f"asked for {up_to}{largest} workers x ({each:g} CPU + {task:g} CPU for their data tasks) = "
            f"{largest * (each + task):g} CPU, "
            f"the cluster has {cpus:g}: the data tasks would starve; nearest: "
            f"{_nearest_cpus(wanted, largest, each, task, cpus)}"
        )


def _nearest_cpus(smallest: int, largest: int, each: float, task: float, cpus: float) -> str:
    """Settings with which workers and their data tasks fit into `cpus`: first smaller workers, then fewer of them."""

    def floor(value: float) -> float:
        return int(value * 100 + SLACK) / 100  # rounded up, it would not fit

    fits = int((cpus + SLACK) // (each + task))
    if smallest < largest and fits >= smallest:
        return f"resources.num_workers=[{smallest},{fits}]"
    if (spare := floor(cpus / largest - task)) > 0:
        return f"resources.cpus_per_worker={spare:g}"
    if fits:
        return f"resources.num_workers={fits}"
    if (spare := floor(cpus - task)) > 0:
        return f"resources.num_workers=1 resources.cpus_per_worker={spare:g}"
    half = floor(cpus / 2)
    return f"resources.num_workers=1 resources.cpus_per_worker={half:g} data.num_cpus_per_task={half:g}"


def _gpus(available: dict[str, float]) -> str:
    gpus = [
        f"{n:g}x {name.removeprefix('accelerator_type:')}"
        for name, n in available.items()
        if name.startswith("accelerator_type:")
    ]
    return ", ".join(gpus) or "of no known type"


def most_workers(config: RunConfig, available: dict[str, float]) -> int:
    """Workers for which there is room, their data tasks included; at least 1.

    Without GPUs no more than the run asks for.
    """
    resources, each = config.resources, config.resources.cpus_per_worker + config.data.num_cpus_per_task
    room = int((available.get("CPU", 0) + SLACK) // each)
    if not use_gpu(config, available):
        return max(1, min(room, resources.workers[1]))
    return max(1, min(room, int(available.get("GPU", 0) // resources.gpus_per_worker)))
