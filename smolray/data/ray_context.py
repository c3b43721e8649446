"""How our Ray Data jobs run: without progress bars of their own, and not more tasks at a time than there are cores."""

import logging

import ray
from ray.data import TaskPoolStrategy


def quiet_context() -> ray.data.DataContext:
    """Ray Data without progress bars and start-up notes: our own progress line says what matters."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that the bars are off
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return context


def at_once(consumers: int, tasks: int) -> TaskPoolStrategy:
    """As many tasks at a time as the cluster has cores for each of `consumers` pipelines: a share of a CPU lets tasks
    run beside other work, but by itself it would start several busy processes a core.
    """
    return TaskPoolStrategy(size=max(1, min(tasks, int(ray.cluster_resources().get("CPU", 1)) // consumers)))
