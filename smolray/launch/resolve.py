"""A run as it will be trained on the connected cluster: resolved once, before anything starts.

In: the RunConfig that the user wrote, and what Ray counts. Out: a ResolvedRun, whose paths are absolute, whose workers
are counted and whose global batch is a number.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolray import storage
from smolray.config import ConfigError, RunConfig, check_run, load_config
from smolray.data.reader import Folders
from smolray.launch.resources import Cluster, check_resources, count_workers
from smolray.planner import auto
from smolray.run.events import read_events
from smolray.run.folder import RunFolder

NO_DATA = Folders("")


@dataclass(frozen=True)
class ResolvedRun:
    """One run on one cluster.

    Attributes:
        config: What is trained. `resources.num_workers` is a number, or (min, max) for an elastic run.
        num_workers: `resources.num_workers` as the user wrote it.
        begun: The run has trained before, and keeps its global batch.
        reason: Why there are so many workers, where `resources.num_workers` is `auto`; else empty.
        folders: The prepared data; empty until they are prepared.
    """

    config: RunConfig
    num_workers: Any
    begun: bool
    reason: str = ""
    folders: Folders = NO_DATA

    @property
    def stored(self) -> RunConfig:
        """What `config.yaml` keeps: a resume on another cluster counts the workers again."""
        return self.config.replace({"resources.num_workers": self.num_workers})


def resolve(config: RunConfig, cluster: Cluster) -> ResolvedRun:
    """Resolve a run on a cluster. The data are not read yet.

    Raises ConfigError for settings that do not work together, and ResourcesError where the cluster is too small.
    """
    config = with_absolute_paths(config)
    earlier, asked, reason = _earlier(config), config.resources.num_workers, ""
    if earlier is not None and config.data.max_length == "auto":  # a run keeps the limit with which it began
        config = config.replace({"data.max_length": earlier.data.max_length})
    if asked == "auto":
        batch = config.train.global_batch or (earlier.global_batch if earlier else None)
        workers, reason = count_workers(config, cluster, batch)
        config = config.replace({"resources.num_workers": workers})

    config = with_fixed_batch(config, earlier)
    check_run(config)
    config = auto.bounded(config)
    check_resources(config, cluster.available)
    return ResolvedRun(config, asked, earlier is not None, reason)


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Local paths made absolute: a worker's current folder is not the driver's."""
    return config.replace(
        {
            "storage": storage.absolute(config.storage),
            "model.path": _absolute(config.model.path),
            "data.train": config.data.with_paths(_absolute),
            "data.validation": _absolute(config.data.validation),
            "data.shards": _absolute(config.data.shards),
        }
    )


def with_fixed_batch(config: RunConfig, earlier: RunConfig | None) -> RunConfig:
    """The run with its global batch as a number.

    `earlier`: the run when it was launched last. A run keeps the global batch with which it began, whatever the number
    of workers now.
    """
    fixed = {"train.global_batch": config.global_batch, "train.gradient_accumulation_steps": 1}
    if earlier is not None and config.train.global_batch is None:
        fixed["train.global_batch"] = earlier.global_batch
    if earlier is not None and config.engine.name == "auto":  # the planner also chose the size of the micro-batches
        fixed["train.global_batch"] = earlier.global_batch
        fixed["train.per_device_train_batch_size"] = earlier.train.per_device_train_batch_size
    return config.replace(fixed)


def _earlier(config: RunConfig) -> RunConfig | None:
    """The run as it was stored when it trained last; None for a new one, and for one whose workers never started."""
    stored, events = RunFolder(config.run_dir).config, read_events(config.run_dir)
    begun = not events or any(e["event"] == "start" for e in events)
    if not (begun and storage.exists(stored)):
        return None
    try:
        return load_config(stored)
    except ConfigError as error:
        raise ConfigError(
            f"{error}\n{stored} holds the settings with which the run was started last: put back a copy, or move it "
            "away, and the run goes on with those that are given now"
        ) from None


def _absolute(path: str) -> str:
    """The absolute path where it exists on this machine; a name that does not may be a hub id."""
    return storage.absolute(path) if path and storage.is_local(path) and Path(path).expanduser().exists() else path
