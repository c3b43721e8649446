"""What a run asks of a cluster, held against what the cluster has: said before anything starts, with the nearest that
works.

In: a RunConfig and Ray's count of resources. Out: nothing, or ResourcesError.
"""

from smolray.config import ConfigError, RunConfig


class ResourcesError(ConfigError):
    """The cluster lacks what the run asks for; the message says what was asked, what is there, and the nearest that
    works.
    """


def use_gpu(config: RunConfig, available: dict[str, float]) -> bool:
    return config.resources.use_gpu == "yes" or (config.resources.use_gpu == "auto" and available.get("GPU", 0) > 0)


def check_resources(config: RunConfig, available: dict[str, float]) -> None:
    """Raise ResourcesError where the smallest worker group cannot start, or would leave no CPU for the data tasks that
    feed it.
    """
    wanted, task = config.resources.workers[0], config.data.num_cpus_per_task
    cpus, gpus, each = available.get("CPU", 0), available.get("GPU", 0), config.resources.cpus_per_worker
    if use_gpu(config, available) and wanted * config.resources.gpus_per_worker > gpus:
        fits = int(gpus // config.resources.gpus_per_worker)
        nearest = f"resources.num_workers={fits}" if fits else "resources.use_gpu=no"
        raise ResourcesError(
            f"asked for {wanted} workers x {config.resources.gpus_per_worker:g} GPU, the cluster has {gpus:g} GPU "
            f"({_gpus(available)}); nearest: {nearest}"
        )
    # An elastic group grows as far as its own CPUs reach; its data tasks must still find some then.
    room = [config.resources.workers[1], *([int(cpus // each)] if each else [])]
    room += [int(gpus // config.resources.gpus_per_worker)] if use_gpu(config, available) else []
    largest = max(wanted, min(room))
    if largest * (each + task) > cpus + 1e-9:
        up_to = "up to " if largest > wanted else ""
        raise ResourcesError(
            f"asked for {up_to}{largest} workers x ({each:g} CPU + {task:g} CPU for their data tasks) = {largest * (each + task):g} CPU, "
            f"the cluster has {cpus:g}: the data tasks would starve; nearest: {_nearest_cpus(wanted, largest, each, task, cpus)}"
        )


def _nearest_cpus(smallest: int, largest: int, each: float, task: float, cpus: float) -> str:
    """Settings with which workers and their data tasks fit into `cpus`: smaller shares first, then fewer workers."""

    def floor(value: float) -> float:
        return int(value * 100 + 1e-9) / 100  # rounded up, it would not fit

    fits = int((cpus + 1e-9) // (each + task))
    if smallest < largest and fits >= smallest:
        return f"resources.num_workers=[{smallest},{fits}]"
    if (spare := floor(cpus / largest - task)) > 0:
        return f"resources.cpus_per_worker={spare:g}"
    if fits:
        return f"resources.num_workers={fits}"
    if (spare := floor(cpus - task)) > 0:
        return f"resources.num_workers=1 resources.cpus_per_worker={spare:g}"
    return f"resources.num_workers=1 resources.cpus_per_worker={floor(cpus / 2):g} data.num_cpus_per_task={floor(cpus / 2):g}"


def _gpus(available: dict[str, float]) -> str:
    cards = [
        f"{n:g}x {name.removeprefix('accelerator_type:')}"
        for name, n in available.items()
        if name.startswith("accelerator_type:")
    ]
    return ", ".join(cards) or "no card named"


def most_workers(config: RunConfig, available: dict[str, float]) -> int:
    """Workers for which there is room, their data tasks included; at least 1.

    Without GPUs no more than the run asks for.
    """
    resources, each = config.resources, config.resources.cpus_per_worker + config.data.num_cpus_per_task
    room = int((available.get("CPU", 0) + 1e-9) // each)
    cards = (
        int(available.get("GPU", 0) // resources.gpus_per_worker)
        if use_gpu(config, available)
        else resources.workers[1]
    )
    return max(1, min(room, cards))
