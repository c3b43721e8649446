"""One group of Ray Train workers from its start to its result."""

import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import ray
from ray.train import FailureConfig, ScalingConfig
from ray.train import RunConfig as TrainRunConfig
from ray.train.torch import TorchConfig, TorchTrainer

from smolray import storage
from smolray.config import RunConfig
from smolray.data.reader import Folders
from smolray.launch.elastic import NEVER, ElasticMonitor
from smolray.launch.entrypoint import train_function
from smolray.launch.resources import use_gpu
from smolray.run.status import RESIZED
from smolray.train.task import WorkerTask


def fit(
    config: RunConfig,
    folders: Folders,
    task: WorkerTask = WorkerTask.TRAIN,
    nodes: Sequence[str] = (),
    checkpoint: str = "",
) -> dict[str, Any]:
    """Run the workers under Ray Train and return rank 0's record.

    Ray keeps only its own notes: checkpoints are ours, nothing is uploaded twice.

    `nodes`: the id of the node of each worker; a group that was placed so is not started again by itself.
    `checkpoint`: the URI of the one to evaluate.
    """
    resources, available = config.resources, ray.cluster_resources()
    gpu = use_gpu(config, available)
    each: dict[str, float] = {"CPU": resources.cpus_per_worker} | ({"GPU": resources.gpus_per_worker} if gpu else {})
    low, high = resources.workers
    # Ray's stubs still describe Train v1, hence the untyped settings.
    scaling: dict[str, Any] = {
        "num_workers": high if low == high else (low, high),
        "use_gpu": gpu,
        "resources_per_worker": each,
    }
    scaling["elastic_resize_monitor_interval_s"] = NEVER
    if nodes:
        scaling["label_selector"] = [{**resources.label_selector, "ray.io/node-id": node} for node in nodes]
    elif resources.label_selector:
        scaling["label_selector"] = resources.label_selector
    # How long Ray Train waits for room for a group before it counts the boxes again: one that was just lost may still
    # be counted.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "5")
    # a process more in every group, whose notices nobody reads: `cluster drain` stops runs
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # Ray's own reading of a URI knows no AWS_ENDPOINT_URL
    notes, path = storage.filesystem(storage.join(config.storage, ".ray"))
    function: Any = train_function
    failures: dict[str, Any] = (
        {"max_failures": 0, "controller_failure_limit": 1} if nodes else {"max_failures": resources.max_failures}
    )
    elastic_monitor = ElasticMonitor(config, each)
    while True:
        run = TrainRunConfig(
            name=f"{config.name}-{int(time.time())}",
            storage_path=path,
            storage_filesystem=notes,
            failure_config=FailureConfig(**failures),
        )
        trainer = TorchTrainer(
            function,
            train_loop_config=worker_settings(config, folders, task, checkpoint),
            torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
            scaling_config=ScalingConfig(**scaling),
            run_config=run,
        )
        with elastic_monitor.watching():
            result: Any = trainer.fit()
        if result.return_value.get("status") != RESIZED:
            return result.return_value


def worker_settings(
    config: RunConfig, folders: Folders, task: WorkerTask = WorkerTask.TRAIN, checkpoint: str = ""
) -> dict[str, Any]:
    """What the workers are told, in plain values: unpickled, one of our classes would import torch and more, in the
    controller as well.
    """
    return {
        "config": config.model_dump(mode="json"),
        "folders": asdict(folders),
        "task": task.value,
        "checkpoint": checkpoint,
    }
