"""A search: Ray Tune over trials that are ordinary runs, as many at a time as the cluster holds.

In: a RunConfig with a `search` section. Out: `<storage>/<name>/` with trials.jsonl, best.yaml and report.html, and a
run for each trial next to it. Re-run with the same name to resume: trials that have ended are not repeated, and trials
that had begun resume from their checkpoints.
"""

import logging
import os
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray import tune

from smolray import storage
from smolray.cluster.connect import connect
from smolray.cluster.signals import Stopped, StopSignals, stop_signals
from smolray.config import RunConfig, to_yaml
from smolray.data.reader import Folders
from smolray.launch.background import in_background
from smolray.launch.data import prepare_data
from smolray.launch.resolve import with_absolute_paths
from smolray.launch.resources import Cluster, ResourcesError, check_resources, places, use_gpu
from smolray.launch.session import refuse_lost_storage
from smolray.launch.waiting import announce
from smolray.run.lease import Lease, owning
from smolray.run.status import clear_stop, stop_requested
from smolray.tracking.notify import send
from smolray.tracking.registry import check_tracking
from smolray.tune.callbacks import DRIVER_RESTARTS, LoggingCallback, PopulationSetting, StopRequest, TrialQueue
from smolray.tune.conflicts import refuse_foreign_runs, refuse_other_search
from smolray.tune.console import SearchDisplay
from smolray.tune.cost import make_cost_estimator
from smolray.tune.log import FILE, STORED, TrialLog, search_folder
from smolray.tune.result import finish, trial_base
from smolray.tune.scheduler import make_scheduler
from smolray.tune.searcher import make_searcher
from smolray.tune.space import Space, read_space, total_trials
from smolray.tune.trial import RunTrial

NOTICE = b"\nstopping: the trials save first; once more to end at once\n"
GO_ON = "The same command again goes on with it"
# Ray reserves one byte of memory for the driver of a trial, which only waits for its run. A CPU would be missing for
# the data tasks of that run.
DRIVER = {"CPU": 0.0, "memory": 1.0}
# Tune's own loggers and console output are off: the log of the search is ours. Its handler of Ctrl-C is off because it
# ends the trials before they have saved.
TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}


@dataclass(frozen=True)
class SearchSession:
    """The values that the steps of one session of a search share.

    Attributes:
        base: the config to which each trial's settings are applied.
        folders: the prepared data of all trials.
        total: trials of the whole search.
        slots: the number of trials at a time.
        signals: Ctrl-C and SIGTERM of this process.
    """

    base: RunConfig
    folders: Folders
    space: Space
    trial_log: TrialLog
    total: int
    slots: int
    signals: StopSignals


def search_run(config: RunConfig) -> dict[str, Any]:
    """Search to the end. Returns the content of the search's `result.json`.

    Raises ConfigError before any trial starts where the space has a fault or the name belongs to another search, and
    ResourcesError where not even one trial fits into the cluster.
    """
    began = time.time()
    space = read_space(config)
    refuse_lost_storage(config)
    config = with_absolute_paths(config)
    folder, total = search_folder(config.storage, config.name), total_trials(config, space)
    refuse_other_search(config, folder)
    refuse_foreign_runs(config, folder, total)
    storage.require_writable(config.storage, "storage")
    check_tracking(config)

    with stop_signals() as signals, owning(folder, "tune", log=FILE) as lease:
        watch = in_background(partial(_end_where_lost, lease, signals))
        signals.notice = NOTICE
        try:
            with watch:
                result = _search(config, space, folder, total, signals, began)
        except Stopped:
            raise Stopped(f"{config.name} stopped. {GO_ON}", signals.code) from None
        except Exception as error:
            _notify(config, "failed", f"{type(error).__name__}: {error}")
            raise
        if signals.number:
            raise Stopped(f"{config.name} stopped; its trials have saved. {GO_ON}", signals.code)
        if not result["left"]:
            _notify(config, "finished", f"{total} trials: {folder}")
        return result


def _notify(config: RunConfig, what: str, body: str) -> None:
    if unsent := send(config, what, body):
        print(unsent, flush=True)


def _search(
    config: RunConfig, space: Space, folder: str, total: int, signals: StopSignals, began: float
) -> dict[str, Any]:
    """Prepare the data once, run the trials, and write the result."""
    connect()
    announce(f"search {config.name}")
    base = trial_base(config)
    slots = trials_at_a_time(base, total)

    storage.write_bytes(storage.join(folder, STORED), to_yaml(config).encode())
    clear_stop(folder)
    asked = base.model.vision_features
    base, folders, _ = prepare_data(base)  # once, for all trials
    base = base.replace({"model.vision_features": asked})  # each trial decides for its own tiles and passes

    trial_log = TrialLog(folder)
    trial_log.write("start", trials=total, slots=slots)
    if trial_log.unended(total):
        run_trials(
            SearchSession(base, folders, space, trial_log, total, slots, signals),
            SearchDisplay(trial_log, config, space, total),
        )
    trial_log.write("over", stopped=trial_log.unended(total) > 0 or stop_requested(folder))
    return finish(config, space, trial_log, total, time.time() - began)


def _end_where_lost(lease: Lease, signals: StopSignals, over: threading.Event) -> None:
    """End a search that another process has taken over."""
    while not over.wait(1.0):
        if loss := lease.loss():
            signals.interrupt(loss)
            return


def trials_at_a_time(base: RunConfig, total: int) -> int:
    """The number of trials that the connected cluster holds at a time.

    Raises ResourcesError where not even one fits, or not the whole population of population-based training.
    """
    cluster = Cluster.connected()
    check_resources(base, cluster.available)
    slots = concurrency(base, cluster)
    if base.search and base.search.scheduler == "pbt" and total > slots:
        nearest = f"search.num_samples={slots}" if slots > 1 else "search.scheduler=asha"
        raise ResourcesError(
            f"search.scheduler = pbt trains its whole population at a time: {total} trials, "
            f"and {slots} fit into the cluster; nearest: {nearest}"
        )
    return slots


def concurrency(base: RunConfig, cluster: Cluster) -> int:
    """The number of trials that run at a time. Each worker and its data task must fit on one node."""
    most = base.search.max_concurrent if base.search else None
    gpu = use_gpu(base, cluster.available)
    fits = max(1, sum(places(base, node, gpu) for node in cluster.nodes) // base.resources.workers[0])
    return min(fits, most) if most else fits


def run_trials(session: SearchSession, display: SearchDisplay) -> None:
    """Run the trials that have not ended according to the log."""
    base, trial_log = session.base, session.trial_log
    os.environ |= TUNE_SETTINGS
    logging.getLogger("ray.tune").setLevel(logging.ERROR)

    known = trial_log.in_order()
    searcher = make_searcher(base, session.space, known)
    cost_estimator = make_cost_estimator(base, session.folders, ray.nodes())
    stop = StopRequest(trial_log, base.storage, session.signals)
    queue = TrialQueue(searcher, known, session.total, cost_estimator, trial_log, stop)

    assert base.search is not None
    if base.search.scheduler == "pbt":
        param_space = population(queue, session.total)
        if not param_space:
            return  # no trial fits into a GPU, and the log says why
        source: dict[str, Any] = {"num_samples": 1}
    else:
        param_space = {}
        left = trial_log.unended(session.total)
        source = {"num_samples": left, "max_concurrent_trials": session.slots, "search_alg": queue}

    callback = LoggingCallback(trial_log, display, searcher, stop)
    scheduler = make_scheduler(base, session.space, known)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(RunTrial, base=base.model_dump(mode="json")), DRIVER),
        param_space=param_space,
        tune_config=tune.TuneConfig(
            scheduler=scheduler,
            trial_name_creator=lambda trial: f"{base.name}-{trial.config['number']}",
            trial_dirname_creator=lambda trial: f"{base.name}-{trial.config['number']}",
            **source,
        ),
        run_config=tune_run_config(base, callback, stop),
    )
    session.signals.patient = True
    with display:
        tuner.fit()


def population(queue: TrialQueue, total: int) -> dict[str, Any]:
    """The settings of all trials as Tune's param_space: Tune's scheduler for populations takes no searcher.

    Empty where no trial fits into a GPU.
    """
    suggested = [queue.suggest("") for _ in range(total)]
    by_number = {settings["number"]: settings for settings in suggested if isinstance(settings, dict)}
    if not by_number:
        return {}
    keys = [key for key in next(iter(by_number.values())) if key != "number"]
    return {"number": tune.grid_search(list(by_number))} | {
        key: tune.sample_from(PopulationSetting(by_number, key)) for key in keys
    }


def tune_run_config(base: RunConfig, callback: LoggingCallback, stop: StopRequest) -> tune.RunConfig:
    """Where Tune keeps its own files, which nothing reads later, and whom it tells of the trials."""
    filesystem, path = storage.filesystem(storage.join(base.storage, ".ray"))
    return tune.RunConfig(
        name=f"{base.name}-{int(time.time())}",
        storage_path=path,
        storage_filesystem=filesystem,
        verbose=0,
        failure_config=tune.FailureConfig(max_failures=DRIVER_RESTARTS),
        callbacks=[callback],
        stop=stop,
    )
