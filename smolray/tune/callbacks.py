"""The hooks of Ray Tune's driver: which trial starts next, what a trial has reported, whether to stop.

In: the log of the search, and what Tune reports. Out: events of the log.

Ray's Searcher (here RaySearcher) is Tune's interface for the next trial, which TrialQueue implements; it asks our own
Searcher (searcher.py), which knows nothing of Ray, for the settings.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from ray import tune
from ray.tune.search import Searcher as RaySearcher

from smolray import storage
from smolray.run.status import request_stop, stop_requested
from smolray.tune.console import SearchDisplay
from smolray.tune.cost import CostEstimator
from smolray.tune.log import TrialLog, TrialRecord
from smolray.tune.searcher import Searcher

DRIVER_RESTARTS = 3
POLL_SECONDS = 2.0  # between two looks at whether the search is to stop


class DriverOnly:
    """An object that stays in Tune's driver: Tune pickles its hooks to restore them, which a search does not need."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


class StopRequest(DriverOnly, tune.Stopper):
    """`smolray stop` or Ctrl-C for a search: no new trial starts, and those that run are asked to save and stop."""

    def __init__(self, trial_log: TrialLog, runs: str):
        self.trial_log, self.runs = trial_log, runs
        self.requested = False
        self._polled = 0.0

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        """Tune calls this often. Never True: Tune would kill the trials before they have saved."""
        if time.monotonic() - self._polled < POLL_SECONDS:
            return False
        self._polled = time.monotonic()

        with contextlib.suppress(OSError):  # storage that is away for a moment is read again at the next call
            self.requested = self.requested or stop_requested(self.trial_log.folder)
            for trial in self.trial_log.trials.values():
                if self.requested and not trial.ended:
                    request_stop(storage.join(self.runs, trial.run))
        return False

    @contextlib.contextmanager
    def catching_interrupts(self) -> Iterator[None]:
        """Inside the block the first Ctrl-C stops the search; the second one interrupts.

        Only the main thread receives them; elsewhere the block changes nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former = signal.getsignal(signal.SIGINT) or signal.default_int_handler

        def on_interrupt(*_: Any) -> None:
            self.requested = True
            signal.signal(signal.SIGINT, former)
            # not print: the interrupted code may be inside it
            os.write(2, b"\nthe trials save and stop; Ctrl-C again does not wait for them\n")

        signal.signal(signal.SIGINT, on_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, former)


class TrialQueue(DriverOnly, RaySearcher):
    """The trials in the order in which Tune starts them: first those that an earlier session left, then new ones.

    A new trial that fits into no GPU is logged as failed and not started.
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
        """Nothing: LoggingCallback tells the searcher, with the reason."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a search resumes from its log."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""


class PopulationSetting:
    """One setting of a population, by the trial's number, as tune.sample_from calls it."""

    def __init__(self, by_number: dict[int, dict[str, Any]], key: str):
        self.by_number, self.key = by_number, key

    def __call__(self, spec: Any) -> Any:
        return self.by_number[spec.config["number"]][self.key]


class LoggingCallback(DriverOnly, tune.Callback):
    """Logs what Tune reports of the trials, passes ended trials to the searcher, and updates the display."""

    def __init__(self, trial_log: TrialLog, display: SearchDisplay, searcher: Searcher, stop: StopRequest):
        self.trial_log, self.display, self.searcher, self.stop = trial_log, display, searcher, stop

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Before the first step, and again after an exploit."""
        self.display.show()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """An evaluated checkpoint, or the end."""
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
        """The run has ended, or the scheduler has stopped it."""
        last = trial.last_result or {}
        status = "failed" if last.get("failed") else "finished" if last.get("over") else "stopped"
        self._end(number_of(trial), status, last.get("failed", ""))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial's driver was lost more often than it is restarted."""
        self._end(number_of(trial), "failed", f"the trial's driver was lost {DRIVER_RESTARTS + 1} times")

    def _end(self, number: int, status: str, reason: str) -> None:
        if self.stop.requested:
            return  # the trial has not ended: the next session of the search resumes it
        self.trial_log.write("end", number=number, status=status, reason=reason)
        self.searcher.observe(self.trial_log.trials[number])
        self.display.show()
        self.display.write_report()


def number_of(trial: Any) -> int:
    """The number of a Tune trial: from its name, because an exploit copies the config of another trial."""
    return int(str(trial).rsplit("-", 1)[1])
