"""How our Ray Data jobs run: without Ray's progress bars, and with at most one task for each core at a time."""

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
    """Limit the tasks at a time to the cores that the cluster has for each of `consumers` pipelines.

    A task asks for a fraction of a CPU, so that it can run next to other work. Without the limit several busy processes
    would share a core.
    """
    return TaskPoolStrategy(size=max(1, min(tasks, int(ray.cluster_resources().get("CPU", 1)) // consumers)))
