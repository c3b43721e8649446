"""From a RunConfig to a finished run: resolve it, prepare its data, start its workers, write its result.

In: a validated config and a Ray cluster. Out: the run folder with result.json, and its record. The driver prepares,
the workers train.
"""

import time
from dataclasses import replace
from typing import Any

from ray.train import TrainingFailedError

from smolray import storage
from smolray.cluster.connect import connect, worker_logs
from smolray.config import ConfigError, RunConfig, to_yaml
from smolray.data.ray_context import cluster_capacity
from smolray.data.ray_jobs import ensure_index, load_index
from smolray.data.reader import Folders, Sidecars
from smolray.launch.data import prepare_data
from smolray.launch.follow import followed
from smolray.launch.queue import queued
from smolray.launch.ray_train import fit
from smolray.launch.resolve import NO_DATA, ResolvedRun, resolve, with_absolute_paths
from smolray.launch.resources import Cluster, most_workers
from smolray.launch.result import finish, finished_result
from smolray.launch.session import RunError, Session, started_run
from smolray.launch.waiting import announce
from smolray.model.load import check_weights
from smolray.model.tiny import SHAPES
from smolray.planner import auto
from smolray.planner.probe import HardwareProbe
from smolray.planner.statistics import DataStatistics
from smolray.precompute.jobs import found_features
from smolray.run.checkpoint import chosen_checkpoint
from smolray.run.events import EventLog
from smolray.run.folder import RunFolder
from smolray.run.lease import owning
from smolray.train.task import WorkerTask


def launch_run(config: RunConfig) -> dict[str, Any]:
    """Run to the end or to a stop, from the newest checkpoint if there is one. Returns what `result.json` holds.

    Raises ResourcesError within seconds where the cluster is too small, what `started_run` raises, and the worker's own
    error when its restarts are used up.
    """
    with started_run(config) as session:
        return train_run(session)


def train_run(session: Session) -> dict[str, Any]:
    """Resolve the run of a session, prepare its data, train it and write its result."""
    began, config = time.time(), session.config
    connect()
    announce(f"run {config.name}")
    run = resolve(config, Cluster.connected())
    if run.config.model.path not in SHAPES:
        check_weights(run.config.model)

    config, folders, accounts = prepare_data(run.config)
    run = replace(run, config=config, folders=folders)
    if finished := finished_result(run.stored):
        return finished
    storage.delete(RunFolder(config.run_dir).result)  # a run that is stopped or killed from here on has none
    if config.engine.name != "auto":
        store_config(run)

    with followed(config, folders), queued(config), session.workers(config):
        reason = {"workers": run.reason} if run.reason else {}
        log = EventLog(config.run_dir)
        log.write("data", **{part: account.to_json() for part, account in accounts.items()})
        log.write("launch", **reason, logs=worker_logs())
        log.flush()
        owner = session.lease.id
        record = fit_planned(run, owner) if config.engine.name == "auto" else fit(config, folders, owner=owner)
        if "error" in record:
            raise RunError(record["error"])
    return finish(config, folders, record, time.time() - began)


def store_config(run: ResolvedRun) -> None:
    """Write the run's config.yaml, from which it is resumed."""
    storage.write_bytes(RunFolder(run.config.run_dir).config, to_yaml(run.stored).encode())


def fit_planned(run: ResolvedRun, owner: str) -> dict[str, Any]:
    """`engine: auto`: probe the GPUs, plan, train. After the loss of a worker, repeat it with those that are left.

    Raises auto.NothingFitsError, and the workers' error when max_failures are used up.
    """
    lost, after, folders = 0, "", run.folders
    statistics = DataStatistics.from_index(load_index(folders.train, run.config), run.config.data.repeats)
    while True:
        seen = HardwareProbe.from_json(fit(run.config, folders, WorkerTask.PROBE))
        chosen = auto.choose(run.config, statistics, seen, run.begun)
        run = replace(run, config=chosen.kept, begun=True)
        store_config(run)

        log = EventLog(run.config.run_dir)
        log.write("plan", **chosen.reported, after=after)
        log.flush()
        try:
            return fit(chosen.run, folders, nodes=chosen.nodes, owner=owner)
        except TrainingFailedError as error:
            lost, after = lost + 1, f"{type(error).__name__}: {error}".splitlines()[0][:300]
            if 0 <= run.config.resources.max_failures < lost:
                raise


def look(config: RunConfig) -> HardwareProbe:
    """The GPUs of the cluster, as many as there may be workers."""
    most = most_workers(config, cluster_capacity())
    everywhere = with_absolute_paths(config).replace({"resources.num_workers": (1, most)})
    return HardwareProbe.from_json(fit(everywhere, NO_DATA, WorkerTask.PROBE))


def evaluate_run(config: RunConfig, name: str | None = None) -> dict[str, Any]:
    """Decode the validation shards of a run with one of its checkpoints, over its workers.

    The default is the best, else the newest. Raises LeaseError while another process trains, evaluates or exports it.
    """
    if not config.data.validation:
        raise ConfigError("data.validation is not set: there is nothing to evaluate on")
    storage.require_writable(config.run_dir, "the run's folder")
    with owning(config.run_dir, "evaluate") as lease:
        connect()
        chosen = chosen_checkpoint(config.run_dir, name)
        config = resolve(config, Cluster.connected()).config

        ensure_index(config.data.validation, config)
        features = Sidecars(found_features(config.data.validation, config))
        folders = Folders(config.data.train_folder, config.data.validation, validation_sidecars=features)
        return fit(config, folders, WorkerTask.EVALUATE, checkpoint=chosen.uri, owner=lease.id)
