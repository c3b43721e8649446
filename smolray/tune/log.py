"""The log of a search, `<search>/trials.jsonl`. A resume, the live table and the report read it.

In: events of the trials, from the driver. Out: a TrialRecord for each trial.

Kinds: start (trials, slots) and over (stopped) of a session, trial (number, run, settings, gpu_minutes: as planned),
report (number, report, run, step, accuracy, loss, seconds, memory_bytes, workers), exploit (number, run, origin, hash,
step, settings), end (number, status: finished | stopped | failed, reason). `report` counts 1, 2, 3 over the life
of the weights: a trial that exploits another continues the count of the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from smolray import storage
from smolray.run.events import Event, EventLog, read_events

FILE = "trials.jsonl"
STORED = "search.yaml"  # the search as its newest session was configured
# The value of a trial that could not run, so that the searcher avoids its settings. Only its rank matters.
WORST = {"accuracy": 0.0, "loss": 1e6}


@dataclass
class TrialRecord:
    """One trial, as the log describes it.

    Attributes:
        settings: the current ones; with pbt each of `exploits` has changed them.
        reason: why the trial failed.
        gpu_minutes: the planner's estimate for the whole run.
    """

    number: int
    run: str
    settings: dict[str, Any]
    status: str = "running"
    reason: str = ""
    reports: list[Event] = field(default_factory=list)
    exploits: list[Event] = field(default_factory=list)
    gpu_minutes: float | None = None

    @property
    def ended(self) -> bool:
        return self.status != "running"

    @property
    def reported(self) -> int:
        """The number of the newest report of its current run, 0 before the first."""
        return int(self.reports[-1]["report"]) if self.reports and self.reports[-1]["run"] == self.run else 0

    @property
    def steps(self) -> int:
        """Optimizer steps, by its newest report."""
        return int(self.reports[-1]["step"]) if self.reports else 0

    @property
    def seconds(self) -> float:
        """Seconds of training, by its newest report."""
        return float(self.reports[-1]["seconds"]) if self.reports else 0.0

    @property
    def worker_minutes(self) -> float:
        return self.seconds * int(self.reports[-1].get("workers", 1)) / 60 if self.reports else 0.0

    def value(self, metric: str) -> float | None:
        """The best reported value. None for a trial that has failed or has not reported."""
        found = [report[metric] for report in self.reports if report.get(metric) is not None]
        if self.status == "failed" or not found:
            return None
        return min(found) if metric == "loss" else max(found)

    def cost(self, objective: str) -> float | None:
        """The value of a second objective: `memory`, the peak in GiB, or `seconds` of training."""
        if not self.reports:
            return None
        if objective == "seconds":
            return self.seconds
        return max(report.get("memory_bytes") or 0 for report in self.reports) / 2**30


class TrialLog(EventLog):
    """Appends to the log of the search in `folder`, and keeps a record of each trial by its number."""

    def __init__(self, folder: str):
        # Each event is written at once: they are few, and nothing would flush the last one.
        super().__init__(folder, flush_seconds=0.0, file=FILE)
        self.folder, self.name = folder, folder.rstrip("/").rsplit("/", 1)[-1]
        self.trials = {t.number: t for t in read_trials(folder)}

    def write(self, event: str, **fields: Any) -> None:
        """Log one event. A report that a resumed trial repeats is left out."""
        known = self.trials.get(fields.get("number", 0))
        if event == "report" and known and fields["report"] <= known.reported:
            return
        super().write(event, **fields)
        _apply(self.trials, {"event": event, **fields})

    def in_order(self) -> list[TrialRecord]:
        """All trials by number."""
        return [self.trials[number] for number in sorted(self.trials)]

    def unended(self, total: int) -> int:
        """The number of trials of `total` that have not ended or not begun."""
        return sum(not trial.ended for trial in self.trials.values()) + max(0, total - len(self.trials))


def read_trials(folder: str) -> list[TrialRecord]:
    """The trials of the search in `folder`, by number."""
    trials: dict[int, TrialRecord] = {}
    for event in read_events(folder, FILE):
        _apply(trials, event)
    return [trials[number] for number in sorted(trials)]


def _apply(trials: dict[int, TrialRecord], event: Event) -> None:
    """Change the records by one event of the log."""
    kind = event["event"]
    if kind == "trial":
        trials[event["number"]] = TrialRecord(
            event["number"], event["run"], event["settings"], gpu_minutes=event.get("gpu_minutes")
        )
    elif kind == "report":
        trials[event["number"]].reports.append(event)
    elif kind == "exploit":
        trial = trials[event["number"]]
        trial.exploits.append(event)
        trial.run, trial.settings = event["run"], event["settings"]
    elif kind == "end":
        trial = trials[event["number"]]
        trial.status, trial.reason = event["status"], event.get("reason", "")


def best_trial(trials: Sequence[TrialRecord], metric: str) -> TrialRecord | None:
    """The trial with the best value; among equal values the one with fewer steps."""
    valued = [(value, t) for t in trials if (value := t.value(metric)) is not None]
    if not valued:
        return None
    sign = 1 if metric == "loss" else -1
    return min(valued, key=lambda item: (sign * item[0], item[1].steps, item[1].number))[1]


def search_folder(storage_uri: str, name: str) -> str:
    """The folder of a search: its log, best.yaml and report."""
    return storage.join(storage_uri, name)
