"""A search: Ray Tune over trials that are ordinary runs, side by side as far as the cluster reaches.

In: a RunConfig with a `search` section. Out: `<storage>/<name>/` with trials.jsonl, best.yaml and report.html, and a
run for each trial beside it. The same name again goes on: what is in the log is not tried twice, and trials that had
begun go on from their checkpoints.
"""

import json
import logging
import os
import re
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler

from smolray import storage
from smolray.cluster.connect import connect
from smolray.config import ConfigError, RunConfig, load_config, to_yaml
from smolray.data.ray_jobs import load_index
from smolray.data.reader import Folders
from smolray.launch import driver as launch
from smolray.launch.data import prepare_data
from smolray.launch.resolve import refuse_lost_storage, with_absolute_paths
from smolray.launch.resources import Cluster, ResourcesError, check_resources, places, use_gpu
from smolray.planner.inventory import GPU, InventoryError, find_gpu
from smolray.planner.shapes import shape_of
from smolray.planner.statistics import DataStatistics
from smolray.run.folder import CONFIG, EVENTS, RunFolder
from smolray.run.status import clear_stop, stop_requested
from smolray.tune.callbacks import DRIVER_RESTARTS, Column, CostEstimator, LoggingCallback, Queue, StopRequest
from smolray.tune.console import Board
from smolray.tune.cost import CostEstimate, estimate_cost
from smolray.tune.log import TrialLog, TrialRecord, best_trial, read_trials, search_folder
from smolray.tune.proposals import make_searcher
from smolray.tune.report import write_report
from smolray.tune.space import Domain, Settings, Space, longest, read_space, total_trials, trial_run
from smolray.tune.trial import ORIGIN, RunTrial

STORED = "search.yaml"
# of the search section, between two sessions of one search
CHANGEABLE = ("num_samples", "max_concurrent", "train_best")
# one byte: a trial's driver waits for its run, and a CPU of its own could starve that run's data tasks
DRIVER = {"CPU": 0.0, "memory": 1.0}
HYPERBAND_BRACKETS = 3
OF_A_RUN = (EVENTS, CONFIG, ORIGIN, STORED)


def search_run(config: RunConfig) -> dict[str, Any]:
    """Search to the end. Returns what `result.json` of the search holds.

    Raises ConfigError before any trial starts where the space has a fault or the name belongs to another search, and
    ResourcesError where not even one trial fits into the cluster.
    """
    began = time.time()
    space = read_space(config)
    refuse_lost_storage(config)
    config = with_absolute_paths(config)
    assert config.search is not None
    folder = search_folder(config.storage, config.name)
    total = total_trials(config, space)
    refuse_other_search(config, folder)
    refuse_strays(config, folder, total)
    connect()
    base = trial_base(config)
    cluster = Cluster.connected()
    check_resources(base, cluster.available)
    slots = concurrency(base, cluster)
    if config.search.scheduler == "pbt" and total > slots:
        raise ResourcesError(
            f"search.scheduler = pbt trains its population side by side: {total} trials, {slots} fit into the cluster at a time; "
            f"nearest: {f'search.num_samples={slots}' if slots > 1 else 'search.scheduler=asha'}"
        )
    storage.write_bytes(storage.join(folder, STORED), to_yaml(config).encode())
    clear_stop(folder)
    base, folders = prepare_data(base)  # once, for all trials
    trial_log = TrialLog(folder)
    trial_log.write("start", trials=total, slots=slots)
    board = Board(trial_log, config, space, total)
    if unended(trial_log, total):
        run_trials(base, folders, space, trial_log, board, slots, total)
    trial_log.write("over", stopped=unended(trial_log, total) > 0 or stop_requested(folder))
    return finish(config, space, trial_log, total, time.time() - began)


def unended(trial_log: TrialLog, total: int) -> int:
    """How many trials are left: those that have not ended, and those that have not begun."""
    return sum(not t.ended for t in trial_log.trials.values()) + max(0, total - len(trial_log.trials))


def run_trials(
    base: RunConfig, folders: Folders, space: Space, trial_log: TrialLog, board: Board, slots: int, total: int
) -> None:
    """Run what the log does not yet have the end of."""
    search = base.search
    assert search is not None
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # the log is ours; Tune's would stand beside it
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    known = [trial_log.trials[n] for n in sorted(trial_log.trials)]
    searcher = make_searcher(base, space, known)
    cost_estimator = make_cost_estimator(base, folders, ray.nodes())
    scheduler = make_scheduler(base, space)
    recall(scheduler, known)
    asked = StopRequest(trial_log, base.storage)
    queue = Queue(searcher, known, total, cost_estimator, trial_log, asked)
    settings: dict[str, Any] = {"max_concurrent_trials": slots, "search_alg": queue}
    param_space: dict[str, Any] = {}
    if search.scheduler == "pbt":  # its scheduler takes no searcher: the population is known beforehand
        table = [queue.suggest("") for _ in range(total)]
        population = [row for row in table if isinstance(row, dict)]
        if not population:
            return  # the planner has turned every trial down, and the log says why
        keys = population[0]
        numbered = {row["number"]: row for row in population}
        param_space = {"number": tune.grid_search(list(numbered))}
        param_space |= {key: tune.sample_from(Column(numbered, key)) for key in keys if key != "number"}
        settings = {}
    notes, path = storage.filesystem(storage.join(base.storage, ".ray"))
    left = unended(trial_log, total)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(RunTrial, base=base.model_dump(mode="json")), DRIVER),
        param_space=param_space,
        tune_config=tune.TuneConfig(
            num_samples=1 if search.scheduler == "pbt" else left,
            scheduler=scheduler,
            trial_name_creator=lambda t: f"{base.name}-{t.config['number']}",
            trial_dirname_creator=lambda t: f"{base.name}-{t.config['number']}",
            **settings,
        ),
        run_config=tune.RunConfig(
            name=f"{base.name}-{int(time.time())}",
            storage_path=path,
            storage_filesystem=notes,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=DRIVER_RESTARTS),
            callbacks=[LoggingCallback(trial_log, board, searcher, asked)],
            stop=asked,
        ),
    )
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Tune's ends the trials before they have saved
    with board, asked.hearing_interrupts():
        tuner.fit()


def make_cost_estimator(base: RunConfig, folders: Folders, nodes: list[dict[str, Any]]) -> CostEstimator:
    """Prices a trial's settings on the cards of the cluster that the planner knows; None where it has no say."""
    gpus: list[GPU] = []
    for node in nodes:
        kinds = [
            name.removeprefix("accelerator_type:") for name in node["Resources"] if name.startswith("accelerator_type:")
        ]
        if node["Alive"] and kinds and node["Resources"].get("GPU", 0) > 0:
            try:
                gpus.append(find_gpu(kinds[0]))
            except InventoryError:
                return lambda settings: None  # a trial might fit into the one that is not known
    counted = DataStatistics.from_index(load_index(folders.train, base)) if gpus else None

    def cost_estimator(settings: Settings) -> CostEstimate | None:
        if counted is None or not use_gpu(base, {"GPU": len(gpus)}):
            return None
        run = trial_run(base, settings)
        shape = shape_of(run.model)
        retiled = (run.image, run.data, run.model.path) != (base.image, base.data, base.model.path)
        return estimate_cost(
            run,
            shape,
            replace(DataStatistics.default(run, shape), samples=counted.samples) if retiled else counted,
            gpus,
        )

    return cost_estimator


def trial_base(config: RunConfig) -> RunConfig:
    """The run that settings are laid over: an elastic one with as few workers as it allows, so that more trials stand
    side by side.
    """
    low, high = config.resources.workers
    settings: Settings = {"resources.num_workers": low}
    if low != high:
        settings |= {"train.global_batch": config.global_batch, "train.gradient_accumulation_steps": 1}
    if config.search and config.search.scheduler == "pbt":  # what others may still want to copy
        settings["checkpoint.save_total_limit"] = max(config.checkpoint.save_total_limit, 4)
    if config.search and config.search.metric == "loss":
        settings["evaluate.loss"] = True
    return config.replace(settings)


def concurrency(base: RunConfig, cluster: Cluster) -> int:
    """How many trials run at a time: every worker of each, and a data task for each worker, has its place on some node."""
    most = base.search.max_concurrent if base.search else None
    gpu = use_gpu(base, cluster.available)
    fits = max(1, sum(places(base, node, gpu) for node in cluster.nodes) // base.resources.workers[0])
    return min(fits, most) if most else fits


def make_scheduler(config: RunConfig, space: Space) -> TrialScheduler:
    """Tune's scheduler for `config.search`. Time is counted in reports."""
    search = config.search
    assert search is not None
    goal: dict[str, Any] = {
        "metric": search.metric,
        "mode": "min" if search.metric == "loss" else "max",
        "time_attr": "report",
    }
    if search.scheduler == "none":
        return FIFOScheduler()
    if search.scheduler == "pbt":
        return PopulationBasedTraining(
            **goal,
            perturbation_interval=search.perturbation_interval,
            hyperparam_mutations={key: domain(draw) for key, draw in space.items()},
            custom_explore_fn=Bounds(space),
            log_config=False,
        )
    top = longest(config, space)
    brackets = HYPERBAND_BRACKETS if search.scheduler == "hyperband" else 1
    while brackets > 1 and search.grace_period * search.reduction_factor ** (brackets - 1) > top:
        brackets -= 1  # a bracket whose first rung lies beyond the end would stop nobody
    # One more than the last report: a trial ends by itself, with its result written, and is not cut off there.
    grace = min(search.grace_period, top)
    return AsyncHyperBandScheduler(
        **goal, max_t=top + 1, grace_period=grace, reduction_factor=search.reduction_factor, brackets=brackets
    )


class Bounds:
    """Brings what population-based training has multiplied back into the space."""

    def __init__(self, space: Space):
        self.space = space

    def __call__(self, settings: dict[str, Any]) -> dict[str, Any]:
        clipped = dict(settings)
        for key, draw in self.space.items():
            if not draw.values:
                value = min(max(clipped[key], draw.low), draw.high)
                clipped[key] = round(value) if draw.kind == "int" else value
        return clipped


def domain(draw: Domain) -> Any:
    """A Draw in Tune's words; a list is stepped through by neighbours."""
    if draw.values:
        return list(draw.values)
    if draw.kind == "int":
        return tune.randint(int(draw.low), int(draw.high) + 1)
    return tune.loguniform(draw.low, draw.high) if draw.kind == "loguniform" else tune.uniform(draw.low, draw.high)


def recall(scheduler: TrialScheduler, known: list[TrialRecord]) -> None:
    """Tell asha's rungs what earlier sessions have seen, so that new trials are measured against it."""
    if not isinstance(scheduler, AsyncHyperBandScheduler):
        return
    controller: Any = None  # which this scheduler does not look at
    for trial in known:
        past: Any = SimpleNamespace(trial_id=f"past-{trial.number}")
        scheduler.on_trial_add(controller, past)
        for report in trial.reports:
            scheduler.on_trial_result(controller, past, report)
        scheduler.on_trial_remove(controller, past)


def refuse_other_search(config: RunConfig, folder: str) -> None:
    """Raise ConfigError where the name belongs to a search whose trials could not be compared with this one's."""
    path = storage.join(folder, STORED)
    if not storage.exists(path):
        if storage.exists(RunFolder(folder).events):
            raise ConfigError(
                f"name = {config.name!r} is a run under {config.storage}; choose another name for the search"
            )
        return
    # Read as a run: a setting that is newer than the stored file has its default there.
    before = load_config(path)
    stored, now = before.model_dump(mode="json"), config.model_dump(mode="json")
    for record, run in ((stored, before), (now, config)):
        record.pop("resources")  # these follow the cluster; what they make of the batch may not change
        record["train"]["global_batch"] = run.global_batch
        for key in CHANGEABLE:
            record["search"].pop(key)
    differ = sorted(
        f"{section}{'' if name is None else f'.{name}'}"
        for section in now
        for name in _differences(stored.get(section), now[section])
    )
    if differ:
        raise ConfigError(
            f"search {config.name!r} was begun with other settings of {', '.join(differ)}: its trials could not be compared; "
            f"choose another name, or put them back ({path})"
        )


def refuse_strays(config: RunConfig, folder: str, total: int) -> None:
    """Raise ConfigError where a run that is not of this search has the name of one of its trials: the trial would go on
    with what it holds.
    """
    known = {trial.number for trial in read_trials(folder)}
    pattern = re.compile(re.escape(config.name) + r"-([1-9]\d*)(-g\d+)?")
    named = [
        name
        for name in storage.list_dirs(config.storage)
        if (m := pattern.fullmatch(name)) and int(m[1]) <= total and int(m[1]) not in known
    ]
    strays = [
        name for name in named if any(storage.exists(storage.join(config.storage, name, file)) for file in OF_A_RUN)
    ]
    if strays:
        raise ConfigError(
            f"under {config.storage} stand runs called as trials of search {config.name!r}, whose log does not know them: {', '.join(strays)}; "
            "choose another name for the search, or move them away"
        )


def _differences(one: Any, other: Any) -> list[str | None]:
    if isinstance(one, dict) and isinstance(other, dict):
        return [key for key in sorted({*one, *other}) if one.get(key) != other.get(key)]
    return [] if one == other else [None]


def best_config(config: RunConfig, trial: TrialRecord) -> RunConfig:
    """The run of a trial under a name of its own, on the workers of `config` and with the batch that the trial had,
    whatever their number.
    """
    run = trial_run(trial_base(config), trial.settings)
    had = load_config(RunFolder(storage.join(config.storage, trial.run)).config)
    batch = {
        "train.global_batch": had.global_batch,
        "train.gradient_accumulation_steps": 1,
        "train.per_device_train_batch_size": had.train.per_device_train_batch_size,
    }
    name = f"{config.name}-best{trial.run.removeprefix(config.name)}"  # of this trial: another best is another run
    return run.replace({"name": name, "resources": config.resources, **batch})


def finish(config: RunConfig, space: Space, trial_log: TrialLog, total: int, seconds: float) -> dict[str, Any]:
    """Write best.yaml, result.json and the report; train with best.yaml where the search says so and no trial is left."""
    search = config.search
    assert search is not None
    trials = [trial_log.trials[n] for n in sorted(trial_log.trials)]
    best = best_trial(trials, search.metric)
    result: dict[str, Any] = {
        "name": config.name,
        "metric": search.metric,
        "trials": len(trials),
        "steps": sum(t.steps for t in trials),
        "seconds": round(seconds, 1),
        "worker_minutes": round(sum(t.worker_minutes for t in trials), 2),
        "failed": {t.number: t.reason for t in trials if t.status == "failed"},
        "left": unended(trial_log, total),
    }
    if best is not None:
        value = best.value(search.metric)
        path = storage.join(trial_log.folder, "best.yaml")
        result["best"] = {
            "number": best.number,
            "run": best.run,
            search.metric: value,
            "settings": best.settings,
            "config": path,
        }
        changed = (
            " Its settings changed on the way (trials.jsonl has them): this is where they ended."
            if best.exploits
            else ""
        )
        head = f"# Trial {best.number} of search {config.name}: {search.metric} {value:.6g} after {best.steps} steps.{changed}\n"
        storage.write_bytes(path, (head + to_yaml(best_config(config, best))).encode())
    storage.write_bytes(RunFolder(trial_log.folder).result, json.dumps(result, indent=1).encode())
    write_report(trial_log.folder, config, space)
    if best is not None and search.train_best and not result["left"] and not stop_requested(trial_log.folder):
        result["final"] = launch.launch_run(best_config(config, best))
    return result
