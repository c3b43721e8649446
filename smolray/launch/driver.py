"""From a RunConfig to a finished run: shards, index, Ray Train, result.

In: a validated config and a Ray cluster. Out: the run folder with result.json, and its record. The driver prepares and
asks; workers train.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.train import TrainingFailedError

from smolray import storage
from smolray.cluster.connect import connect
from smolray.config import ConfigError, RunConfig, check_run, load_config, to_yaml
from smolray.data.ray_jobs import ensure_index, load_index
from smolray.data.reader import Folders, Sidecars
from smolray.launch.background import beside
from smolray.launch.data import prepare_data
from smolray.launch.ray_train import fit
from smolray.launch.resources import check_resources, most_workers
from smolray.launch.result import finish, finished_result
from smolray.planner import auto
from smolray.planner.probe import HardwareProbe
from smolray.planner.statistics import DataStatistics
from smolray.precompute.jobs import found_features
from smolray.run.checkpoint import chosen_checkpoint
from smolray.run.events import EventLog, EventTail
from smolray.run.progress import event_line
from smolray.run.status import STOP_FLAG


class RunError(ValueError):
    """The run ended in a way that starting its workers again cannot mend, such as a non-finite loss."""


def launch_run(config: RunConfig) -> dict[str, Any]:
    """Run to the end or to a stop, from the newest checkpoint if there is one. Returns what `result.json` holds.

    Raises ResourcesError within seconds where the cluster is too small, and the worker's own error when its restarts
    are used up.
    """
    began = time.time()
    refuse_lost_storage(config)
    connect()
    begun = storage.exists(storage.join(config.run_dir, "config.yaml"))
    config = auto.bounded(with_fixed_batch(with_absolute_paths(config)))
    check_resources(config, ray.cluster_resources())
    storage.delete(storage.join(config.run_dir, STOP_FLAG))
    config, folders = prepare_data(config)
    if finished := finished_result(config):
        return finished
    storage.delete(storage.join(config.run_dir, "result.json"))  # what is stopped or killed from here on has none
    if config.engine.name != "auto":
        storage.write_bytes(storage.join(config.run_dir, "config.yaml"), to_yaml(config).encode())
    with shown_progress(config):
        try:
            record = fit_planned(config, folders, begun) if config.engine.name == "auto" else fit(config, folders)
        except Exception as error:
            EventLog(config.run_dir).write("end", status="failed", error=f"{type(error).__name__}: {error}"[:2000])
            raise
        if "error" in record:
            EventLog(config.run_dir).write("end", status="failed", error=record["error"])
            raise RunError(record["error"])
    return finish(config, folders, record, time.time() - began)


@contextmanager
def shown_progress(config: RunConfig) -> Iterator[None]:
    """Print the run's events as lines while it goes on. The workers' own output stays in Ray's logs."""
    run_dir, tail = config.run_dir, EventTail(config.run_dir, skip=True)

    def follow(over: threading.Event) -> None:
        total = None
        while True:
            last = over.is_set()
            for event in tail.new():
                total = event.get("total_steps", total)
                if event["event"] != "step" or event["step"] % config.train.logging_steps == 0:
                    print(event_line(event, total), flush=True)
            if last:
                return
            over.wait(1.0 if storage.is_local(run_dir) else 5.0)

    with beside(follow):
        yield


def refuse_lost_storage(config: RunConfig) -> None:
    """Raise ConfigError where a Ray job would write its run into Ray's copy of the working directory, which is deleted
    with the job.
    """
    if (
        "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
        and storage.is_local(config.storage)
        and not Path(config.storage).expanduser().is_absolute()
    ):
        raise ConfigError(
            f"storage = {config.storage!r} in a submitted job is a folder of its temporary working directory; "
            "expected an absolute path that all boxes share, or s3://bucket/runs"
        )


def with_fixed_batch(config: RunConfig) -> RunConfig:
    """The run with its global batch spelt out.

    A run that began keeps the one it has, whatever the number of workers now.
    """
    stored = storage.join(config.run_dir, "config.yaml")
    fixed = {"train.global_batch": config.global_batch, "train.gradient_accumulation_steps": 1}
    if storage.exists(stored):
        kept = load_config(stored)
        if config.train.global_batch is None:
            fixed["train.global_batch"] = kept.global_batch
        if config.engine.name == "auto":  # and the size of a micro-batch that was chosen then
            fixed |= {
                "train.global_batch": kept.global_batch,
                "train.per_device_train_batch_size": kept.train.per_device_train_batch_size,
            }
    config = config.replace(fixed)
    check_run(config)
    return config


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Local paths made absolute: a worker's current folder is not the driver's."""
    return config.replace(
        {
            "storage": storage.absolute(config.storage),
            "model.path": _absolute(config.model.path),
            "data.train": _absolute(config.data.train),
            "data.validation": _absolute(config.data.validation),
            "data.shards": _absolute(config.data.shards),
        }
    )


def _absolute(path: str) -> str:
    """Only what exists on this machine is a path: a bare name may be a hub id."""
    return storage.absolute(path) if path and storage.is_local(path) and Path(path).expanduser().exists() else path


def fit_planned(config: RunConfig, folders: Folders, begun: bool) -> dict[str, Any]:
    """`engine: auto`: look at the cards, plan, train; where a worker is lost, all of it again with those that are left.

    `begun`: the run has trained before and keeps the size of its steps. Raises auto.NothingFitsError, and the workers'
    error when max_failures are used up.
    """
    lost, after, statistics = 0, "", DataStatistics.from_index(load_index(folders.train, config))
    while True:
        seen = HardwareProbe.from_json(fit(config, folders, {"survey": True}))
        chosen = auto.choose(config, statistics, seen, begun)
        config, begun = chosen.kept, True
        storage.write_bytes(storage.join(config.run_dir, "config.yaml"), to_yaml(config).encode())
        log = EventLog(config.run_dir)
        log.write("plan", **chosen.told, after=after)
        log.flush()
        try:
            return fit(chosen.run, folders, nodes=chosen.nodes)
        except TrainingFailedError as error:
            lost, after = lost + 1, f"{type(error).__name__}: {error}".splitlines()[0][:300]
            if 0 <= config.resources.max_failures < lost:
                raise


def look(config: RunConfig) -> HardwareProbe:
    """The cards of the cluster, as many as there may be workers."""
    most = most_workers(config, ray.cluster_resources())
    everywhere = with_absolute_paths(config).replace({"resources.num_workers": (1, most)})
    return HardwareProbe.from_json(fit(everywhere, Folders(""), {"survey": True}))


def evaluate_run(config: RunConfig, name: str | None = None) -> dict[str, Any]:
    """Decode the validation shards of a run with one of its checkpoints (default: the best, else the newest), over its
    workers.
    """
    connect()
    config = auto.bounded(with_absolute_paths(config))
    if not config.data.validation:
        raise ConfigError("data.validation is not set: there is nothing to evaluate on")
    chosen = chosen_checkpoint(config.run_dir, name)
    check_resources(config, ray.cluster_resources())
    ensure_index(config.data.validation, config)
    features = Sidecars(found_features(config.data.validation, config))
    folders = Folders(config.data.train, config.data.validation, validation_sidecars=features)
    return fit(config, folders, {"evaluate": chosen.uri})
