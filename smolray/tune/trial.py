"""One trial of a search: an ordinary run, launched by Ray Train from inside a Tune actor that holds no CPU.

In: settings from Tune, and the run that they change. Out: one result for each evaluated checkpoint, read from the run's
log, and a last one when the run has ended. A checkpoint of Tune is only a pointer to one of ours. A trial that takes
over the weights of another becomes a new run that begins with them.
"""

import json
import re
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray import tune

from smolray import storage
from smolray.config import RunConfig
from smolray.launch.driver import launch_run
from smolray.run import checkpoint
from smolray.run.checkpoint import CheckpointError
from smolray.run.events import Event, EventTail, read_events
from smolray.run.folder import RunFolder
from smolray.run.status import request_stop, run_status, stop_requested
from smolray.tune.domain import Settings
from smolray.tune.log import WORST
from smolray.tune.space import trial_run

POINTER, ORIGIN = "pointer.json", "origin.json"
STOP_SECONDS = 300.0  # a run that is asked to stop saves first
AWAY_SECONDS = 300.0  # storage that cannot be read for this long counts as lost
LOCAL_POLL, REMOTE_POLL = 0.3, 3.0  # seconds between two looks at a run's log
OWN_KEYS = ("number", "reported")  # in Tune's config, next to the settings


@dataclass
class TrialProgress:
    """The progress of a trial, from the log of its run. Training of its weights in other runs counts as well.

    Attributes:
        reports: evaluated checkpoints.
        step: optimizer step of the newest of them.
        checkpoint: its URI.
        metrics: loss and accuracy of the newest of them.
        seconds: of training.
        memory: peak of a worker in bytes.
        total_steps: steps of the whole run, once it has started.
    """

    reports: int = 0
    step: int = 0
    checkpoint: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    memory: int = 0
    workers: int = 1
    total_steps: int | None = None
    losses: list[float] = field(default_factory=list)  # since the newest report
    ends_epoch: bool = False

    def add(self, event: Event, validates: bool) -> bool:
        """Add one event of the run. Returns True where it makes a report.

        `validates`: the run has validation data. Then an evaluated checkpoint makes a report, otherwise the checkpoint
        at the end of an epoch.
        """
        kind = event["event"]
        if kind == "start":
            self.workers, self.total_steps = event["workers"], event["total_steps"]
        elif kind == "step":
            self.seconds += event["seconds"]
            self.memory = max(self.memory, event.get("memory_bytes") or 0)
            self.losses.append(event["loss"])
            self.ends_epoch = float(event["epoch"]).is_integer()
        elif kind == "checkpoint" and event["step"] > self.step:
            reports = "accuracy" in event if validates else self.ends_epoch
            if reports:
                self._report(event)
            return reports
        return False

    @property
    def complete(self) -> bool:
        """Whether the newest report is that of the run's last step."""
        return self.total_steps is not None and self.step >= self.total_steps

    def _report(self, event: Event) -> None:
        self.reports += 1
        self.step, self.checkpoint = event["step"], event["path"]
        mean = sum(self.losses) / len(self.losses) if self.losses else event["loss"]
        self.metrics = {"loss": event.get("validation_loss", mean)}
        if "accuracy" in event:
            self.metrics["accuracy"] = event["accuracy"]
        self.losses = []


class RunTrial(tune.Trainable):
    """A trial as Tune sees it.

    `config`: dotted settings, the trial's `number`, and how many of its reports an earlier session of the search has
    `reported`.
    """

    def setup(self, config: dict[str, Any], base: dict[str, Any] | None = None) -> None:
        self.base = RunConfig.model_validate(base)
        self.settings: Settings = {key: value for key, value in config.items() if key not in OWN_KEYS}
        self.known_reports = int(config["reported"])
        self.pointer: dict[str, Any] = {}
        self.origin: dict[str, Any] = {}
        self.thread: threading.Thread | None = None
        self.failed = ""
        self.begun = False

    def load_checkpoint(self, checkpoint_dir: Any) -> None:
        """Read the pointer to this trial's checkpoint, or to that of the trial whose weights it takes over.

        Tune calls it before the first step.
        """
        self.pointer = json.loads((Path(checkpoint_dir) / POINTER).read_text())

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        pointer = {
            "run": self.run.run_dir,
            "checkpoint": self.progress.checkpoint,
            "reports": self.progress.reports,
        }
        (Path(checkpoint_dir) / POINTER).write_text(json.dumps(pointer))

    def step(self) -> dict[str, Any]:
        """Wait for the run's next evaluated checkpoint, or for its end."""
        if not self.begun:
            self._begin()

        last_read = time.monotonic()
        while True:
            # checked before reading, so that nothing written before the end is missed
            over = self.thread is None or not self.thread.is_alive()
            try:
                self.unread += self.tail.new()
                last_read = time.monotonic()
            except OSError:  # storage that fails for a moment
                if time.monotonic() - last_read > AWAY_SECONDS:
                    raise
                over = False  # what was written before the end must still be read

            while self.unread:
                if not self._reports(self.unread.pop(0)):
                    continue
                if self.progress.complete and self.thread is not None:
                    self.thread.join()  # only the run's own report is still to come
                    over = True
                if not over or self.unread:
                    return self._result()
            if over:
                return self._result(over=True)
            time.sleep(poll_seconds(self.run.run_dir))

    def cleanup(self) -> None:
        """Stop the run, which saves and frees its resources. Called when Tune has stopped the trial."""
        if self.thread is not None and self.thread.is_alive():
            request_stop(self.run.run_dir)
            self.thread.join(STOP_SECONDS)

    def _begin(self) -> None:
        self.begun = True
        self.run, self.origin = choose_run(self.base, self.trial_name, self.settings, self.pointer)
        self.progress = TrialProgress(
            reports=int(self.origin.get("reports", 0)),
            step=int(self.origin.get("step", 0)),
            seconds=float(self.origin.get("seconds", 0)),
        )
        self.tail, self.unread = EventTail(self.run.run_dir), list[Event]()

        wait_for_stop(self.run.run_dir)
        if run_status(self.run.run_dir).state != "finished":
            self.thread = threading.Thread(target=self._launch, daemon=True)
            self.thread.start()

    def _launch(self) -> None:
        try:
            launch_run(self.run)
        except Exception as error:  # whatever it is, the search continues without this trial
            self.failed = reason_of(error)

    def _reports(self, event: Event) -> bool:
        """Add an event. Returns True where it makes a report that no earlier session has logged."""
        reports = self.progress.add(event, validates=self.base.data.evaluates)
        return reports and self.progress.reports > self.known_reports

    def _result(self, over: bool = False) -> dict[str, Any]:
        search = self.base.search
        assert search is not None
        progress, metrics = self.progress, self.progress.metrics

        if over and (self.failed or search.metric not in metrics):
            self.failed = self.failed or "the run ended without an evaluated checkpoint"
            metrics = metrics | {search.metric: WORST[search.metric]}

        return {
            **metrics,
            "report": progress.reports,
            "step": progress.step,
            "seconds": round(progress.seconds, 3),
            "memory_bytes": progress.memory,
            "workers": progress.workers,
            "run": self.run.name,
            "settings": self.origin.get("settings", self.settings),
            "origin": self.origin,
            "over": over,
            "failed": self.failed,
            "done": over,
        }


def wait_for_stop(run_dir: str, patience: float = STOP_SECONDS) -> None:
    """Wait until a run that was asked to stop has saved and ended.

    The trial's former driver may still run it, and a new launch would withdraw the request.
    """
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and stop_requested(run_dir) and run_status(run_dir).state == "running":
        time.sleep(poll_seconds(run_dir))


def poll_seconds(run_dir: str) -> float:
    """Seconds between two looks at what a run has written."""
    return LOCAL_POLL if storage.is_local(run_dir) else REMOTE_POLL


def choose_run(
    base: RunConfig, name: str, settings: Settings, pointer: dict[str, Any]
) -> tuple[RunConfig, dict[str, Any]]:
    """The run that a trial continues with, and the origin of its weights (empty where they are its own).

    A pointer to another trial's checkpoint makes a new run that begins with a copy of it: `<trial>-g2` and so on.
    Without one, or when that run exists already, the trial continues with its newest run under that run's settings.
    """
    pattern = re.compile(re.escape(name) + r"-g(\d+)")
    generations = sorted(
        int(m[1]) for n in storage.list_dirs(base.storage) if (m := pattern.fullmatch(n)) and _origin(base, n)
    )
    newest = f"{name}-g{generations[-1]}" if generations else name
    origin = _origin(base, newest)

    of_another = pointer and pointer["run"].rsplit("/", 1)[-1] != newest
    if of_another and pointer["checkpoint"] != origin.get("checkpoint"):
        steps = [e for e in read_events(storage.join(base.storage, newest)) if e["event"] == "step"]
        spent = origin.get("seconds", 0) + sum(e["seconds"] for e in steps)  # what the trial has cost until now
        newest = f"{name}-g{generations[-1] + 1 if generations else 2}"
        run = trial_run(base, {**settings, "name": newest})
        origin = {"settings": settings, "seconds": spent, **adopt(pointer, run)}
        storage.write_bytes(storage.join(run.run_dir, ORIGIN), json.dumps(origin, indent=1).encode())
    run = trial_run(base, {**origin.get("settings", settings), "name": newest})
    return run, origin


def adopt(pointer: dict[str, Any], run: RunConfig) -> dict[str, Any]:
    """Copy the checkpoint that `pointer` names into `run`, its manifest last. Returns its origin and its weights' hash.

    If it has been pruned in the meantime, the newest checkpoint of its run is copied. Raises CheckpointError where
    there is none, or where the copy is damaged.
    """
    try:
        source = checkpoint.verify(pointer["checkpoint"])
    except CheckpointError:
        newest = checkpoint.latest(pointer["run"])
        if newest is None:
            raise
        source = newest

    target = RunFolder(run.run_dir).checkpoint(source.step)
    manifest = storage.read_bytes(storage.join(source.uri, checkpoint.MANIFEST))
    files = json.loads(manifest)["files"]
    for file in files:
        storage.write_bytes(storage.join(target, file), storage.read_bytes(storage.join(source.uri, file)))
    storage.write_bytes(storage.join(target, checkpoint.MANIFEST), manifest)
    checkpoint.verify(target)

    return {
        "checkpoint": pointer["checkpoint"],
        "copied": source.uri,
        "step": source.step,
        "reports": pointer["reports"],
        "hash": files["weights.safetensors"]["blake2b"],
    }


def reason_of(error: BaseException) -> str:
    """Why a run ended, in one line."""
    text = str(error)
    if re.search(r"out of memory|OutOfMemory|can't allocate memory", text, re.IGNORECASE):
        return f"out of memory: {_line(text, 'memory')}"
    if "the optimizer has not stepped" in text:
        return f"non-finite loss: {_line(text, 'loss is')}"
    return f"{type(error).__name__}: {_line(text, '')}"


def _line(text: str, word: str) -> str:
    """The last line that contains `word`: a traceback ends with the error."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and word in line]
    return lines[-1][:300] if lines else "no message"


def _origin(base: RunConfig, run: str) -> dict[str, Any]:
    try:
        return json.loads(storage.read_bytes(storage.join(base.storage, run, ORIGIN)))
    except FileNotFoundError:
        return {}
