"""The trackers by their names, and whether a run's can be used.

In: report_to and callbacks of a run. Out: consumers for its log, or one message before the run begins.
"""

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from smolray.config import ConfigError, RunConfig
from smolray.tracking.base import TrackedRun, Tracker
from smolray.tracking.callbacks import CallbackConsumer, load_callback
from smolray.tracking.consumer import Images, TrackerConsumer
from smolray.tracking.feed import Consumer, Say
from smolray.tracking.notify import check_notify
from smolray.tracking.tensorboard import logging_dir


@dataclass(frozen=True)
class TrackerTraits:
    """Where a tracker's class is, and the module of its library; its extra has the tracker's name."""

    module: str
    kind: str
    library: str

    def make(self) -> Tracker:
        """A new object of the tracker's class."""
        return getattr(importlib.import_module(f"smolray.tracking.{self.module}"), self.kind)()  # type: ignore[no-any-return]


TRACKERS = {
    "tensorboard": TrackerTraits("tensorboard", "TensorBoard", "tensorboardX"),
    "wandb": TrackerTraits("wandb", "Wandb", "wandb"),
    "mlflow": TrackerTraits("mlflow", "MLflow", "mlflow"),
    "trackio": TrackerTraits("trackio", "Trackio", "trackio"),
    "swanlab": TrackerTraits("swanlab", "SwanLab", "swanlab"),
}


def check_tracking(config: RunConfig) -> None:
    """Raise ConfigError where a tracker is not installed, a callback cannot be made, or nobody can be notified."""
    require_trackers(config.report_to, config.run_dir)
    for path in config.callbacks:
        load_callback(path)
    check_notify(config)


def require_trackers(names: Sequence[str], run_dir: str) -> None:
    """Raise ConfigError where one of the trackers is unknown, not installed, or has no folder to write into."""
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"no tracker is called {name!r}; expected one of {', '.join(TRACKERS)}")
        if find_spec(TRACKERS[name].library) is None:
            raise ConfigError(
                f"report_to names {name}, which is not installed; run `pip install 'smolray[{name}]'`, or leave it out"
            )
        if name == "tensorboard" and not logging_dir(run_dir):
            raise ConfigError(
                f"report_to names tensorboard, which writes to a local folder, and the run is in {run_dir}; "
                "set TENSORBOARD_LOGGING_DIR, or leave it out"
            )


def consumers_of(config: RunConfig, images: Images, say: Say) -> Iterator[Consumer]:
    """What follows the log of a run: its trackers, then its callbacks."""
    yield from tracker_consumers(config, config.report_to, images)
    for path in config.callbacks:
        yield CallbackConsumer(path, config.run_dir, say)


def tracker_consumers(config: RunConfig, names: Sequence[str], images: Images) -> Iterator[Consumer]:
    """A consumer for each of the trackers named."""
    run = TrackedRun(config.name, config.run_dir, config.model_dump(mode="json"), config.group)
    for name in names:
        yield TrackerConsumer(name, TRACKERS[name].make(), run, images)
