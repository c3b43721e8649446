"""Checks whether a search may use its name: folders with that name under its storage must belong to it.

In: a RunConfig and its storage. Out: nothing, or a ConfigError before any trial starts.
"""

import re
from collections.abc import Iterator
from typing import Any

from smolray import storage
from smolray.config import ConfigError, RunConfig, load_config
from smolray.run.folder import CONFIG, has_log
from smolray.tune.log import STORED, read_trials
from smolray.tune.trial import ORIGIN

# Keys of the search section that may differ between two sessions of one search.
CHANGEABLE = ("num_samples", "max_concurrent", "train_best")
RUN_FILES = (CONFIG, ORIGIN, STORED)  # any of them, or a log, shows that a folder is a run or a search


def refuse_other_search(config: RunConfig, folder: str) -> None:
    """Raise ConfigError where the name belongs to a run, or to a search whose trials cannot be compared with these."""
    path = storage.join(folder, STORED)
    if not storage.exists(path):
        if has_log(folder):
            raise ConfigError(
                f"name = {config.name!r} is a run under {config.storage}; choose another name for the search"
            )
        return

    # Loading gives settings that are newer than the stored file their defaults.
    before, now = _comparable(load_config(path)), _comparable(config)
    if differ := sorted(_differences(before, now)):
        raise ConfigError(
            f"search {config.name!r} was begun with other settings of {', '.join(differ)}: "
            f"its trials could not be compared; choose another name, or put them back ({path})"
        )


def refuse_foreign_runs(config: RunConfig, folder: str, total: int) -> None:
    """Raise ConfigError where a run of another origin has the name of one of this search's trials.

    The trial would otherwise resume from the checkpoints of that run.
    """
    known = {trial.number for trial in read_trials(folder)}
    pattern = re.compile(re.escape(config.name) + r"-([1-9]\d*)(-g\d+)?")
    named = [
        name
        for name in storage.list_dirs(config.storage)
        if (m := pattern.fullmatch(name)) and int(m[1]) <= total and int(m[1]) not in known
    ]
    foreign = [name for name in named if _is_begun(storage.join(config.storage, name))]
    if foreign:
        raise ConfigError(
            f"under {config.storage} are runs with the names of trials of search {config.name!r}, "
            f"whose log does not know them: {', '.join(foreign)}; "
            "choose another name for the search, or move them away"
        )


def _is_begun(folder: str) -> bool:
    """Whether a run or a search has written into a folder."""
    return has_log(folder) or any(storage.exists(storage.join(folder, file)) for file in RUN_FILES)


def _comparable(config: RunConfig) -> dict[str, Any]:
    """The settings that must be the same in all sessions."""
    settings = config.model_dump(mode="json")
    settings.pop("resources")  # they follow the cluster; only the global batch must stay the same
    settings["train"]["global_batch"] = config.global_batch
    for key in CHANGEABLE:
        settings["search"].pop(key)
    return settings


def _differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """The dotted keys whose values differ."""
    for section, value in now.items():
        former = before.get(section)
        if isinstance(former, dict) and isinstance(value, dict):
            yield from (f"{section}.{key}" for key in {*former, *value} if former.get(key) != value.get(key))
        elif former != value:
            yield section
