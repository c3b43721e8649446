"""The names of the files in a run's folder.

In: the URI of the folder, local or s3://. Out: the URI of each file in it.
"""

from dataclasses import dataclass

from smolray import storage

CONFIG = "config.yaml"
EVENTS = "events.jsonl"


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run. Every property is a URI; whether the file exists is another question."""

    uri: str

    @property
    def name(self) -> str:
        """The name of the run."""
        return self.uri.rstrip("/").rsplit("/", 1)[-1]

    @property
    def config(self) -> str:
        """The resolved settings of the run."""
        return self._file(CONFIG)

    @property
    def result(self) -> str:
        """The summary that a run writes at its end."""
        return self._file("result.json")

    @property
    def events(self) -> str:
        """The log: one JSON object per line (run/events.py)."""
        return self._file(EVENTS)

    @property
    def report(self) -> str:
        """The HTML report."""
        return self._file("report.html")

    @property
    def report_images(self) -> str:
        """The sample images of the report, from which it can be written again."""
        return self._file("predictions", "images.parquet")

    @property
    def checkpoints(self) -> str:
        """The folder of the checkpoints."""
        return self._file("checkpoints")

    @property
    def predictions(self) -> str:
        """The folder of the predictions of each evaluation."""
        return self._file("predictions")

    @property
    def audit(self) -> str:
        """The folder of the lists of consumed samples (train/audit.py)."""
        return self._file("audit")

    @property
    def export(self) -> str:
        """The default target of `smolray export`."""
        return self._file("export")

    @property
    def adapter(self) -> str:
        """The default target of `smolray export --adapter`."""
        return self._file("adapter")

    @property
    def tensorboard(self) -> str:
        """TensorBoard's files, where the run reports to it."""
        return self._file("tensorboard")

    @property
    def stop_flag(self) -> str:
        """Exists while the run is requested to save and stop."""
        return self._file("control", "stop")

    @property
    def resize_flag(self) -> str:
        """Exists while the workers are requested to save and end, because more of them can be started."""
        return self._file("control", "resize")

    @property
    def owner(self) -> str:
        """The driver that may write into the run (run/lease.py)."""
        return self._file("control", "owner.json")

    @property
    def owner_lock(self) -> str:
        """Locked while the owner is looked at and changed."""
        return self._file("control", "owner.lock")

    @property
    def claims(self) -> str:
        """Who wants to be the owner, on storage that has no locks."""
        return self._file("control", "claims")

    def tracker(self, name: str) -> str:
        """What a tracker knows of the run: its id there, and how many events it has received."""
        return self._file("control", "trackers", f"{name}.json")

    def checkpoint(self, step: int) -> str:
        """The folder of the checkpoint of a step."""
        return storage.join(self.checkpoints, f"step-{step:08d}")

    def predictions_of(self, step: int) -> str:
        """The predictions of the evaluation at a step."""
        return storage.join(self.predictions, f"step-{step:08d}.parquet")

    def audit_of(self, attempt: int, rank: int) -> str:
        """The samples that one worker consumed in one attempt."""
        return storage.join(self.audit, f"attempt-{attempt:05d}-rank-{rank:04d}.jsonl")

    def is_run(self) -> bool:
        """Whether a run has been started in this folder."""
        return storage.exists(self.config) or has_log(self.uri)

    def _file(self, *parts: str) -> str:
        return storage.join(self.uri, *parts)


def log_parts(run_dir: str, file: str = EVENTS) -> str:
    """The folder with the parts of a log, on storage without append (run/parts.py)."""
    return storage.join(run_dir, file.removesuffix(".jsonl"))


def has_log(run_dir: str, file: str = EVENTS) -> bool:
    """Whether there is a log, of a run or of a search."""
    return storage.exists(storage.join(run_dir, file)) or storage.exists(log_parts(run_dir, file))
