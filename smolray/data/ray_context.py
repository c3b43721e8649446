"""How our Ray Data jobs run: without Ray's progress bars, and with at most one task for each core at a time.

Nodes that the cluster's autoscaler has still to start count as well.
"""

import logging

import ray
from ray._private.state import state
from ray.data import TaskPoolStrategy

MOST_NODES = 1000  # of a group without a limit


def quiet_context() -> ray.data.DataContext:
    """Ray Data without progress bars and start-up notes: our own progress line says what matters."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that the bars are off
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return context


def at_once(consumers: int, tasks: int) -> TaskPoolStrategy:
    """Limit the tasks at a time to the cores that the cluster has for each of `consumers` pipelines.

    A task asks for a fraction of a CPU, so that it can run next to other work. Without the limit several busy processes
    would share a core.
    """
    return TaskPoolStrategy(size=max(1, min(tasks, int(cluster_capacity().get("CPU", 1)) // consumers)))


def startable_nodes() -> list[dict[str, float]]:
    """The resources of each node that the autoscaler may run, up or not; empty where there is no autoscaler."""
    config = state.get_cluster_config()
    if config is None:
        return []
    nodes = []
    for group in config.node_group_configs:
        most = MOST_NODES if group.max_count < 0 else min(group.max_count, MOST_NODES)
        nodes += [{name: float(amount) for name, amount in group.resources.items()}] * most
    return nodes


def cluster_capacity() -> dict[str, float]:
    """What the cluster has, by Ray's names, or may have: an autoscaler may have no node up when a run begins."""
    capacity, nodes = dict(ray.cluster_resources()), startable_nodes()
    for name in {name for node in nodes for name in node}:
        capacity[name] = max(capacity.get(name, 0.0), sum(node.get(name, 0.0) for node in nodes))
    return capacity
