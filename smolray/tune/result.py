"""The results of a search: best.yaml, result.json and the report.

In: the log of the trials. Out: files in the folder of the search, and a final run where `search.train_best` is set.
"""

import json
from typing import Any

from smolray import storage
from smolray.config import RunConfig, load_config, to_yaml
from smolray.launch.driver import launch_run
from smolray.run.folder import RunFolder
from smolray.run.status import stop_requested
from smolray.tune.log import TrialLog, TrialRecord, best_trial
from smolray.tune.report import write_report
from smolray.tune.space import Settings, Space, trial_run

BEST = "best.yaml"


def trial_base(config: RunConfig) -> RunConfig:
    """The config to which each trial's settings are applied.

    An elastic run gets its smallest number of workers, so that more trials run at a time. The search itself sends the
    messages.
    """
    low, high = config.resources.workers
    settings: Settings = {"resources.num_workers": low, "group": config.group or config.name, "notify": ()}
    if low != high:
        settings |= {"train.global_batch": config.global_batch, "train.gradient_accumulation_steps": 1}

    if config.search and config.search.scheduler == "pbt":  # other trials may still copy the older ones
        settings["checkpoint.save_total_limit"] = max(config.checkpoint.save_total_limit, 4)
    if config.search and config.search.metric == "loss":
        settings["evaluate.loss"] = True
    return config.replace(settings)


def best_config(config: RunConfig, trial: TrialRecord) -> RunConfig:
    """The config of the final run: the settings and batch of `trial`, the workers of `config`, and a new name."""
    run = trial_run(trial_base(config), trial.settings)

    had = load_config(RunFolder(storage.join(config.storage, trial.run)).config)
    batch = {
        "train.global_batch": had.global_batch,
        "train.gradient_accumulation_steps": 1,
        "train.per_device_train_batch_size": had.train.per_device_train_batch_size,
    }

    name = f"{config.name}-best{trial.run.removeprefix(config.name)}"  # another best trial makes another run
    return run.replace({"name": name, "resources": config.resources, "notify": config.notify, **batch})


def finish(config: RunConfig, space: Space, trial_log: TrialLog, total: int, seconds: float) -> dict[str, Any]:
    """Write best.yaml, result.json and the report. Returns the content of result.json.

    Trains the final run where `search.train_best` is set and no trial is left.
    """
    search = config.search
    assert search is not None
    trials = trial_log.in_order()
    best = best_trial(trials, search.metric)
    result: dict[str, Any] = {
        "name": config.name,
        "metric": search.metric,
        "trials": len(trials),
        "steps": sum(t.steps for t in trials),
        "seconds": round(seconds, 1),
        "worker_minutes": round(sum(t.worker_minutes for t in trials), 2),
        "failed": {t.number: t.reason for t in trials if t.status == "failed"},
        "left": trial_log.unended(total),
    }

    if best is not None:
        result["best"] = {
            "number": best.number,
            "run": best.run,
            search.metric: best.value(search.metric),
            "settings": best.settings,
            "config": write_best(config, trial_log.folder, best),
        }

    storage.write_bytes(RunFolder(trial_log.folder).result, json.dumps(result, indent=1).encode())
    write_report(trial_log.folder, config, space)

    if best is not None and search.train_best and not result["left"] and not stop_requested(trial_log.folder):
        result["final"] = launch_run(best_config(config, best))
    return result


def write_best(config: RunConfig, folder: str, best: TrialRecord) -> str:
    """Write best.yaml, with a comment that names its trial. Returns its URI."""
    assert config.search is not None
    metric = config.search.metric
    note = f"# Trial {best.number} of search {config.name}: {metric} {best.value(metric):.6g} after {best.steps} steps."
    if best.exploits:
        note += " Its settings changed on the way (trials.jsonl has them): these are the last."

    path = storage.join(folder, BEST)
    storage.write_bytes(path, f"{note}\n{to_yaml(best_config(config, best))}".encode())
    return path
