"""One group of Ray Train workers, from its start to its result.

In: a resolved run and its folders. Out: the record of rank 0.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ray.train import FailureConfig, ScalingConfig
from ray.train import RunConfig as TrainRunConfig
from ray.train.torch import TorchConfig, TorchTrainer

from smolray import storage
from smolray.cluster.signals import in_thread
from smolray.config import RunConfig
from smolray.data.ray_context import cluster_capacity
from smolray.data.reader import Folders
from smolray.launch.elastic import NEVER, ElasticMonitor
from smolray.launch.entrypoint import train_function
from smolray.launch.resources import use_gpu, worker_resources
from smolray.run.status import RESIZED
from smolray.train.task import WorkerTask


def fit(
    config: RunConfig,
    folders: Folders,
    task: WorkerTask = WorkerTask.TRAIN,
    nodes: Sequence[str] = (),
    checkpoint: str = "",
    owner: str = "",
) -> dict[str, Any]:
    """Start the workers under Ray Train, wait for them, and return rank 0's record.

    Ray stores nothing but its own notes: checkpoints are written by the workers.

    `nodes`: the id of each worker's node. Ray does not restart a group that was placed in this way.
    `checkpoint`: the URI of the checkpoint to evaluate.
    `owner`: the lease of the run: workers write as long as it is in force.
    """
    # How long Ray Train waits for room for a group before it counts the nodes again: it may still count a lost one.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "5")
    # One process less in every group: nobody reads its notices, `cluster drain` stops the runs.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")

    resources = config.resources
    gpu = use_gpu(config, cluster_capacity())
    each = worker_resources(config, gpu)
    scaling = _scaling(config, each, nodes) | {"use_gpu": gpu}
    failures: dict[str, Any] = {"max_failures": resources.max_failures}
    if nodes:
        failures = {"max_failures": 0, "controller_failure_limit": 1}
    # Ray itself does not read AWS_ENDPOINT_URL for the URI of a storage: it gets our file system.
    notes, path = storage.filesystem(storage.join(config.storage, ".ray"))
    function: Any = train_function
    elastic_monitor = ElasticMonitor(config, each)
    while True:
        trainer = TorchTrainer(
            function,
            train_loop_config=worker_settings(config, folders, task, checkpoint, owner),
            torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
            scaling_config=ScalingConfig(**scaling),
            run_config=TrainRunConfig(
                name=f"{config.name}-{int(time.time())}",
                storage_path=path,
                storage_filesystem=notes,
                failure_config=FailureConfig(**failures),
            ),
        )
        with elastic_monitor.watching():
            result: Any = in_thread(trainer.fit)
        if result.return_value.get("status") != RESIZED:
            return result.return_value


def _scaling(config: RunConfig, each: dict[str, float], nodes: Sequence[str]) -> dict[str, Any]:
    """The arguments of ScalingConfig; untyped, because Ray's stubs still describe Train v1."""
    low, high = config.resources.workers
    labels = config.resources.label_selector
    scaling: dict[str, Any] = {
        "num_workers": high if low == high else (low, high),
        "resources_per_worker": each,
        "elastic_resize_monitor_interval_s": NEVER,
    }
    if nodes:
        scaling["label_selector"] = [{**labels, "ray.io/node-id": node} for node in nodes]
    elif labels:
        scaling["label_selector"] = labels
    return scaling


def worker_settings(
    config: RunConfig,
    folders: Folders,
    task: WorkerTask = WorkerTask.TRAIN,
    checkpoint: str = "",
    owner: str = "",
) -> dict[str, Any]:
    """What the workers receive, in plain values.

    The controller unpickles it too, and one of our classes would import torch there.
    """
    return {
        "config": config.model_dump(mode="json"),
        "folders": asdict(folders),
        "task": task.value,
        "checkpoint": checkpoint,
        "owner": owner,
    }
