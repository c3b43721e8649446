"""The hooks of Ray Tune's driver: they choose the next trial, log what trials report, and stop the search.

In: the log of the search, and the results that Tune passes on. Out: events of the log.

Ray's Searcher (here RaySearcher) is Tune's interface for the next trial, and TrialQueue implements it. TrialQueue takes
the settings from our own Searcher (searcher.py), which does not know Ray.
"""

import contextlib
import time
from collections.abc import Sequence
from typing import Any

from ray import tune
from ray.tune.search import Searcher as RaySearcher

from smolray import storage
from smolray.cluster.signals import StopSignals
from smolray.run.status import request_stop, stop_requested
from smolray.tune.console import SearchDisplay
from smolray.tune.cost import CostEstimator
from smolray.tune.log import TrialLog, TrialRecord
from smolray.tune.searcher import Searcher

DRIVER_RESTARTS = 3
POLL_SECONDS = 2.0  # between two looks at whether the search is to stop


class DriverOnly:
    """An object that stays in Tune's driver. Tune pickles its hooks to restore them; our searches do not need that."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


class StopRequest(DriverOnly, tune.Stopper):
    """`smolray stop` or Ctrl-C for a search: no new trial starts, and the running ones are asked to save and stop."""

    def __init__(self, trial_log: TrialLog, runs: str, signals: StopSignals):
        self.trial_log, self.runs, self.signals = trial_log, runs, signals
        self.requested = False
        self._polled = 0.0

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        """Tune calls this often. Never True: Tune would kill the trials before they have saved."""
        if time.monotonic() - self._polled < POLL_SECONDS:
            return False
        self._polled = time.monotonic()

        with contextlib.suppress(OSError):  # storage that fails for a moment is read again at the next call
            self.requested = self.requested or self.signals.number > 0 or stop_requested(self.trial_log.folder)
            for trial in self.trial_log.trials.values():
                if self.requested and not trial.ended:
                    request_stop(storage.join(self.runs, trial.run))
        return False


class TrialQueue(DriverOnly, RaySearcher):
    """The trials in the order in which Tune starts them: first the interrupted ones of earlier sessions, then new ones.

    A new trial that does not fit into any GPU is logged as failed and not started.
    """

    def __init__(
        self,
        searcher: Searcher,
        known: Sequence[TrialRecord],
        total: int,
        cost_estimator: CostEstimator,
        trial_log: TrialLog,
        stop: StopRequest,
    ):
        super().__init__()
        # Not `self.searcher`: Tune takes an object with this attribute for a wrapper of another RaySearcher.
        self.settings_searcher = searcher
        self.cost_estimator, self.trial_log, self.stop = cost_estimator, trial_log, stop
        self.interrupted = [trial for trial in known if not trial.ended]
        self.new_numbers = iter(range(max((trial.number for trial in known), default=0) + 1, total + 1))

    def suggest(self, trial_id: str) -> Any:
        """The settings of the next trial with its number, as RunTrial takes them."""
        if self.stop.requested:
            return RaySearcher.FINISHED
        if self.interrupted:
            trial = self.interrupted.pop(0)
            return {**trial.settings, "number": trial.number, "reported": trial.reported}

        for number in self.new_numbers:
            settings = self.settings_searcher.suggest(number)
            cost = self.cost_estimator(settings)
            self.trial_log.write(
                "trial",
                number=number,
                run=f"{self.trial_log.name}-{number}",
                settings=settings,
                gpu_minutes=cost.gpu_minutes if cost else None,
            )
            if cost is None or not cost.lacks:
                return {**settings, "number": number, "reported": 0}
            self.trial_log.write("end", number=number, status="failed", reason=cost.lacks)
            self.settings_searcher.observe(self.trial_log.trials[number])
        return RaySearcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Do nothing: LoggingCallback informs the searcher, with the reason."""

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: a search resumes from its log."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing."""


class PopulationSetting:
    """The values of one setting for a population, by the trial's number; tune.sample_from calls it."""

    def __init__(self, by_number: dict[int, dict[str, Any]], key: str):
        self.by_number, self.key = by_number, key

    def __call__(self, spec: Any) -> Any:
        return self.by_number[spec.config["number"]][self.key]


class LoggingCallback(DriverOnly, tune.Callback):
    """Logs what Tune reports of the trials, passes ended trials to the searcher, and updates the display."""

    def __init__(self, trial_log: TrialLog, display: SearchDisplay, searcher: Searcher, stop: StopRequest):
        self.trial_log, self.display, self.searcher, self.stop = trial_log, display, searcher, stop

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Update the display. Called before the first step and again after an exploit."""
        self.display.show()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Log an evaluated checkpoint, and before it an exploit."""
        number = number_of(trial)
        if result["run"] != self.trial_log.trials[number].run:
            origin = result["origin"]
            self.trial_log.write(
                "exploit",
                number=number,
                run=result["run"],
                origin=origin["copied"],
                hash=origin["hash"],
                step=origin["step"],
                settings=result["settings"],
            )
        if not result["failed"]:
            names = ("report", "run", "step", "accuracy", "loss", "seconds", "memory_bytes", "workers")
            self.trial_log.write("report", number=number, **{name: result[name] for name in names if name in result})
        self.display.show()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Log the end of a trial: its run has ended, or the scheduler has stopped it."""
        last = trial.last_result or {}
        status = "failed" if last.get("failed") else "finished" if last.get("over") else "stopped"
        self._end(number_of(trial), status, last.get("failed", ""))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Log a failure: the trial's driver was lost more often than it is restarted."""
        self._end(number_of(trial), "failed", f"the trial's driver was lost {DRIVER_RESTARTS + 1} times")

    def _end(self, number: int, status: str, reason: str) -> None:
        if self.stop.requested:
            return  # the trial has not ended: the next session of the search resumes it
        self.trial_log.write("end", number=number, status=status, reason=reason)
        self.searcher.observe(self.trial_log.trials[number])
        self.display.show()
        self.display.write_report()


def number_of(trial: Any) -> int:
    """The number of a Tune trial. It is read from the name, because an exploit copies another trial's config."""
    return int(str(trial).rsplit("-", 1)[1])
