"""What Tune's driver asks of a search and tells it: which trial comes next, what became of it, whether to stop.

In: the log. Out: lines of the log.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from smolray import storage
from smolray.run.status import request_stop, stop_requested
from smolray.tune import proposals
from smolray.tune.console import Board
from smolray.tune.cost import CostEstimate
from smolray.tune.log import TrialLog, TrialRecord
from smolray.tune.space import Settings

DRIVER_RESTARTS = 3
LOOK_SECONDS = 2.0  # between two looks at whether the search is to stop

CostEstimator = Callable[[Settings], CostEstimate | None]


class Unpickled:
    """Tuner writes itself down for a restore that we do without: what lives in the driver alone is left out."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


class StopRequest(Unpickled, tune.Stopper):
    """`smolray stop` or Ctrl-C for a search: no trial starts any more, and the runs of those that go on are asked to
    save and stop.
    """

    def __init__(self, trial_log: TrialLog, runs: str):
        self.trial_log, self.runs, self.heard, self.looked = trial_log, runs, False, 0.0

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        """Tune asks this all the time. Never True: it would kill what the trials hold before they have saved."""
        if time.monotonic() - self.looked >= LOOK_SECONDS:
            self.looked = time.monotonic()
            with contextlib.suppress(OSError):  # a storage that is away for a moment is asked again
                self.heard = self.heard or stop_requested(self.trial_log.folder)
                for trial in self.trial_log.trials.values():
                    if self.heard and not trial.ended:
                        request_stop(storage.join(self.runs, trial.run))
        return False

    @contextlib.contextmanager
    def hearing_interrupts(self) -> Iterator[None]:
        """Within it the first Ctrl-C asks the search to stop; the second one interrupts.

        Threads beside the main one hear none.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former = signal.getsignal(signal.SIGINT) or signal.default_int_handler

        def hear(*_: Any) -> None:
            self.heard = True
            signal.signal(signal.SIGINT, former)
            # print may be what was interrupted
            os.write(2, b"\nthe trials save and stop; Ctrl-C again does not wait for them\n")

        signal.signal(signal.SIGINT, hear)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, former)


class Queue(Unpickled, Searcher):
    """What Tune asks for trials: those that an earlier session left first, then new ones; those that fit into no card
    are only written down.
    """

    def __init__(
        self,
        searcher: proposals.Searcher,
        known: list[TrialRecord],
        total: int,
        cost_estimator: CostEstimator,
        trial_log: TrialLog,
        asked: StopRequest,
    ):
        super().__init__()
        self.searcher, self.cost_estimator, self.trial_log, self.asked = searcher, cost_estimator, trial_log, asked
        self.interrupted = [t for t in known if not t.ended]
        self.fresh = iter(range(max((t.number for t in known), default=0) + 1, total + 1))

    def suggest(self, trial_id: str) -> Any:
        """The settings of a trial with its number, as the RunTrial expects them."""
        if self.asked.heard:
            return Searcher.FINISHED
        if self.interrupted:
            trial = self.interrupted.pop(0)
            return {**trial.settings, "number": trial.number, "reported": trial.reported}
        for number in self.fresh:
            settings = self.searcher.suggest(number)
            estimate_cost = self.cost_estimator(settings)
            self.trial_log.write(
                "trial",
                number=number,
                run=f"{self.trial_log.name}-{number}",
                settings=settings,
                gpu_minutes=estimate_cost.gpu_minutes if estimate_cost else None,
            )
            if estimate_cost is None or not estimate_cost.lacks:
                return {**settings, "number": number, "reported": 0}
            self.trial_log.write("end", number=number, status="failed", reason=estimate_cost.lacks)
            self.searcher.learn(self.trial_log.trials[number])
        return Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The searcher hears of it from the log, with the reason."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the log of the search is what it goes on from."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""


class Column:
    """One setting of a population that is known beforehand, by the trial's number."""

    def __init__(self, rows: dict[int, dict[str, Any]], key: str):
        self.rows, self.key = rows, key

    def __call__(self, spec: Any) -> Any:
        return self.rows[spec.config["number"]][self.key]


class LoggingCallback(Unpickled, tune.Callback):
    """Writes down what Tune sees, tells the searcher, and shows it."""

    def __init__(self, trial_log: TrialLog, board: Board, searcher: proposals.Searcher, asked: StopRequest):
        self.trial_log, self.board, self.searcher, self.asked = trial_log, board, searcher, asked

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Before the first step, and again after an exploit."""
        self.board.show()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """An evaluated checkpoint, or the end."""
        number, record = number_of(trial), self.trial_log.trials[number_of(trial)]
        if result["run"] != record.run:
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
        self.board.show()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The run has ended, or the scheduler has stopped it."""
        last = trial.last_result or {}
        status = "failed" if last.get("failed") else "finished" if last.get("over") else "stopped"
        self._end(number_of(trial), status, last.get("failed", ""))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial's driver was lost more often than it is started again."""
        self._end(number_of(trial), "failed", f"the trial's driver was lost {DRIVER_RESTARTS + 1} times")

    def _end(self, number: int, status: str, reason: str) -> None:
        if self.asked.heard:
            return  # the same name goes on with it
        self.trial_log.write("end", number=number, status=status, reason=reason)
        self.searcher.learn(self.trial_log.trials[number])
        self.board.show()
        self.board.save()


def number_of(trial: Any) -> int:
    """Of a Tune trial. Its name, not its config: an exploit copies that of another."""
    return int(str(trial).rsplit("-", 1)[1])
