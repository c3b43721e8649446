"""One trial of a search: an ordinary run, launched by Ray Train from inside a Tune actor that holds no CPU.

In: settings from Tune, and the run they are laid over. Out: one result for each evaluated checkpoint, read from the
run's own log, and a last one when the run is over. What Tune keeps as a checkpoint is a pointer to one of ours; a trial
that takes over another's weights becomes a new run that begins with them.
"""

import json
import re
import threading
import time
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
from smolray.tune.log import WORST
from smolray.tune.space import Settings, trial_run

POINTER, ORIGIN = "pointer.json", "origin.json"
STOP_SECONDS = 300.0  # a run that was asked to stop saves first
AWAY_SECONDS = 300.0  # a storage that cannot be read for so long is lost
LOCAL_POLL, REMOTE_POLL = 0.3, 3.0  # seconds between two looks at a run's log
OWN_KEYS = ("number", "reported")  # beside the settings in Tune's config


class RunTrial(tune.Trainable):
    """`config`: dotted settings, the trial's `number`, and how many of its reports an earlier session of the search has
    `reported`.
    """

    def setup(self, config: dict[str, Any], base: dict[str, Any] | None = None) -> None:
        self.base = RunConfig.model_validate(base)
        self.settings: Settings = {k: v for k, v in config.items() if k not in OWN_KEYS}
        self.skip = int(config["reported"])
        self.pointer: dict[str, Any] = {}
        self.origin: dict[str, Any] = {}
        self.thread: threading.Thread | None = None
        self.begun = False

    def load_checkpoint(self, checkpoint_dir: Any) -> None:
        """Before the first step: where this trial, or the one whose weights it takes over, stood."""
        self.pointer = json.loads((Path(checkpoint_dir) / POINTER).read_text())

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        (Path(checkpoint_dir) / POINTER).write_text(
            json.dumps({"run": self.run.run_dir, "checkpoint": self.saved, "reports": self.reports})
        )

    def step(self) -> dict[str, Any]:
        """Wait for the run's next evaluated checkpoint, or its end."""
        if not self.begun:
            self._begin()
        heard = time.monotonic()
        while True:
            # asked before reading, so that nothing written before the end is missed
            over = self.thread is None or not self.thread.is_alive()
            try:
                self.unread += self.tail.new()
                heard = time.monotonic()
            except OSError:  # a storage that is away for a moment
                if time.monotonic() - heard > AWAY_SECONDS:
                    raise
                over = False  # what was written before the end must still be read
            while self.unread:
                if self._take(self.unread.pop(0)) and self.reports > self.skip:
                    if self.total_steps is not None and self.taken >= self.total_steps and self.thread is not None:
                        self.thread.join()  # nothing is left but the run's report
                        over = True
                    if not over or self.unread:
                        return self._result()
            if over:
                return self._result(over=True)
            time.sleep(poll_seconds(self.run.run_dir))

    def cleanup(self) -> None:
        """Tune has stopped the trial: the run saves, and gives back what it holds."""
        if self.thread is not None and self.thread.is_alive():
            request_stop(self.run.run_dir)
            self.thread.join(STOP_SECONDS)

    def _begin(self) -> None:
        self.begun = True
        self.run, self.origin = choose_run(self.base, self.trial_name, self.settings, self.pointer)
        self.reports, self.taken, self.saved, self.failed = (
            int(self.origin.get("reports", 0)),
            int(self.origin.get("step", 0)),
            "",
            "",
        )
        self.seconds, self.memory, self.workers, self.total_steps = float(self.origin.get("seconds", 0)), 0, 1, None
        self.losses: list[float] = []
        self.metrics: dict[str, float] = {}
        self.ends_epoch = False
        self.tail, self.unread = EventTail(self.run.run_dir), list[Event]()
        wait_for_stop(self.run.run_dir)
        if run_status(self.run.run_dir).state != "finished":
            self.thread = threading.Thread(target=self._launch, daemon=True)
            self.thread.start()

    def _launch(self) -> None:
        try:
            launch_run(self.run)
        except Exception as error:  # whatever it is, the search goes on without this trial
            self.failed = reason_of(error)

    def _take(self, event: Event) -> bool:
        """Look at one event of the run; True where it makes a report."""
        kind = event["event"]
        if kind == "start":
            self.workers, self.total_steps = event["workers"], event["total_steps"]
        elif kind == "step":
            self.seconds += event["seconds"]
            self.memory = max(self.memory, event.get("memory_bytes") or 0)
            self.losses.append(event["loss"])
            self.ends_epoch = float(event["epoch"]).is_integer()
        elif kind == "checkpoint" and event["step"] > self.taken:
            due = "accuracy" in event if self.base.data.validation else self.ends_epoch
            if due:
                self.taken, self.saved, self.reports = event["step"], event["path"], self.reports + 1
                mean = sum(self.losses) / len(self.losses) if self.losses else event["loss"]
                self.metrics = {"loss": event.get("validation_loss", mean)} | (
                    {"accuracy": event["accuracy"]} if "accuracy" in event else {}
                )
                self.losses = []
            return due
        return False

    def _result(self, over: bool = False) -> dict[str, Any]:
        search = self.base.search
        assert search is not None
        metrics = self.metrics
        if over and (self.failed or search.metric not in metrics):
            self.failed = self.failed or "the run ended without a checkpoint that was evaluated"
            metrics = metrics | {search.metric: WORST[search.metric]}
        return {
            **metrics,
            "report": self.reports,
            "step": self.taken,
            "seconds": round(self.seconds, 3),
            "memory_bytes": self.memory,
            "workers": self.workers,
            "run": self.run.name,
            "settings": self.run_settings,
            "origin": self.origin,
            "over": over,
            "failed": self.failed,
            "done": over,
        }

    @property
    def run_settings(self) -> Settings:
        return self.origin.get("settings", self.settings)


def wait_for_stop(run_dir: str, patience: float = STOP_SECONDS) -> None:
    """Let a run that was asked to stop save and end, if it is going on: the trial's former driver may hold it, and a
    launch would take the request back.
    """
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and stop_requested(run_dir) and run_status(run_dir).state == "running":
        time.sleep(poll_seconds(run_dir))


def poll_seconds(run_dir: str) -> float:
    """Between two looks at what a run has written."""
    return LOCAL_POLL if storage.is_local(run_dir) else REMOTE_POLL


def choose_run(
    base: RunConfig, name: str, settings: Settings, pointer: dict[str, Any]
) -> tuple[RunConfig, dict[str, Any]]:
    """The run that a trial goes on with, and where its weights came from (empty: from nowhere).

    A pointer to another trial's checkpoint makes a new run that begins with a copy of it: `<trial>-g2` and so on.
    Without one, or when that run is there already, the trial goes on with its newest run under the settings which that
    one has.
    """
    pattern = re.compile(re.escape(name) + r"-g(\d+)")
    generations = sorted(
        int(m[1]) for n in storage.list_dirs(base.storage) if (m := pattern.fullmatch(n)) and _origin(base, n)
    )
    newest = f"{name}-g{generations[-1]}" if generations else name
    origin = _origin(base, newest)
    foreign = (
        pointer and pointer["run"].rsplit("/", 1)[-1] != newest and pointer["checkpoint"] != origin.get("checkpoint")
    )
    if foreign:
        steps = [e for e in read_events(storage.join(base.storage, newest)) if e["event"] == "step"]
        spent = origin.get("seconds", 0) + sum(e["seconds"] for e in steps)  # what the trial has cost until now
        newest = f"{name}-g{generations[-1] + 1 if generations else 2}"
        run = trial_run(base, {**settings, "name": newest})
        origin = {"settings": settings, "seconds": spent, **adopt(pointer, run)}
        storage.write_bytes(storage.join(run.run_dir, ORIGIN), json.dumps(origin, indent=1).encode())
    run = trial_run(base, {**origin.get("settings", settings), "name": newest})
    return run, origin


def adopt(pointer: dict[str, Any], run: RunConfig) -> dict[str, Any]:
    """Copy the checkpoint that `pointer` names into `run`, its manifest last; returns where it came from and the hash
    of its weights.

    One that has been pruned meanwhile gives way to the newest of its run. Raises CheckpointError where there is none,
    or the copy does not hold.
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
    """The last line with `word` in it: a traceback says at its end what happened."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and word in line]
    return lines[-1][:300] if lines else "no message"


def _origin(base: RunConfig, run: str) -> dict[str, Any]:
    try:
        return json.loads(storage.read_bytes(storage.join(base.storage, run, ORIGIN)))
    except FileNotFoundError:
        return {}
