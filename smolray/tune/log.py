"""The log of a search: `<search>/trials.jsonl`, the truth that resuming, the table and the report read.

In: what the driver sees of each trial. Out: a TrialRecord for each, as far as it got.

Kinds: start (trials, slots) and over (stopped) of a session, trial (number, run, settings, gpu_minutes: as planned),
report (number, report, run, step, accuracy, loss, seconds, memory_bytes, workers), exploit (number, run, origin, hash,
step, settings), end (number, status: finished | stopped | failed, reason). `report` counts 1, 2, … over the life of the
weights: a trial that exploits another goes on from the other's count.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from smolray import storage
from smolray.run.events import Event, EventLog, read_events

FILE = "trials.jsonl"
# What a trial that could not run counts as, so that the searcher keeps away from it. Only its rank matters.
WORST = {"accuracy": 0.0, "loss": 1e6}


@dataclass
class TrialRecord:
    """One trial as the log tells it. `settings` are those it has now; with pbt they have changed at each of `exploits`."""

    number: int
    run: str
    settings: dict[str, Any]
    status: str = "running"
    reason: str = ""
    reports: list[Event] = field(default_factory=list)
    exploits: list[Event] = field(default_factory=list)
    gpu_minutes: float | None = None  # what the planner expects of the whole run

    @property
    def ended(self) -> bool:
        return self.status != "running"

    @property
    def reported(self) -> int:
        """The number of the newest report of the run it has now; an exploit goes back to that of the other trial."""
        return int(self.reports[-1]["report"]) if self.reports and self.reports[-1]["run"] == self.run else 0

    @property
    def steps(self) -> int:
        """Optimizer steps it has spent, by its newest report."""
        return int(self.reports[-1]["step"]) if self.reports else 0

    @property
    def seconds(self) -> float:
        """Seconds of training, by its newest report."""
        return float(self.reports[-1]["seconds"]) if self.reports else 0.0

    @property
    def worker_minutes(self) -> float:
        return self.seconds * int(self.reports[-1].get("workers", 1)) / 60 if self.reports else 0.0

    def value(self, metric: str) -> float | None:
        """The best it has reached; None for one that failed or has not reported.

        A failed trial keeps its reports, but nobody wants it.
        """
        found = [report[metric] for report in self.reports if report.get(metric) is not None]
        return None if self.status == "failed" or not found else (min(found) if metric == "loss" else max(found))

    def second(self, objective: str) -> float | None:
        """Peak memory in GiB or seconds of training."""
        if not self.reports:
            return None
        return self.seconds if objective == "seconds" else max(r.get("memory_bytes") or 0 for r in self.reports) / 2**30


class TrialLog(EventLog):
    """Appends to the log of the search in `folder`; a report that is there already is not written again."""

    def __init__(self, folder: str):
        # a few lines a trial, and nothing comes after the last one
        super().__init__(folder, flush_seconds=0.0, file=FILE)
        self.folder, self.name = folder, folder.rstrip("/").rsplit("/", 1)[-1]
        self.trials = {t.number: t for t in read_trials(folder)}

    def write(self, event: str, **fields: Any) -> None:
        """Log one event, unless a resumed trial tells what it has told before."""
        known = self.trials.get(fields.get("number", 0))
        if event == "report" and known and fields["report"] <= known.reported:
            return
        super().write(event, **fields)
        apply(self.trials, {"event": event, **fields})


def read_trials(folder: str) -> list[TrialRecord]:
    """The trials of the search in `folder`, by number."""
    trials: dict[int, TrialRecord] = {}
    for event in read_events(folder, FILE):
        apply(trials, event)
    return [trials[number] for number in sorted(trials)]


def apply(trials: dict[int, TrialRecord], event: Event) -> None:
    """Lay one event of the log over the records."""
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
    """The one with the best value; of equals the one that took fewer steps."""
    valued = [(value, t) for t in trials if (value := t.value(metric)) is not None]
    if not valued:
        return None
    return min(valued, key=lambda v: (v[0] if metric == "loss" else -v[0], v[1].steps, v[1].number))[1]


def search_folder(storage_uri: str, name: str) -> str:
    """Where a search keeps its log, best.yaml and report."""
    return storage.join(storage_uri, name)
