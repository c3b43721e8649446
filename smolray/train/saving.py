"""Checkpoints are written beside training, one at a time: steps go on while a disk or a bucket takes the files.

In: a copy of the training's state on rank 0. Out: a whole checkpoint, and older ones deleted. On other ranks nothing
is written.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from smolray.config import RunConfig
from smolray.run import checkpoint
from smolray.run.checkpoint import Checkpoint, Progress
from smolray.run.lease import require_owner
from smolray.run.state import EngineState
from smolray.train.versions import versions


class CheckpointWriter:
    """Writes the checkpoints of a run in a thread, as long as the run belongs to `owner`."""

    def __init__(self, config: RunConfig, owner: str):
        self.config, self.owner = config, owner
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[Checkpoint] | None = None

    def start(self, state: EngineState, progress: Progress, metrics: Mapping[str, float]) -> None:
        """Begin to write; the one before was collected (`collect`)."""
        assert self._writing is None, "a checkpoint was written and not collected"
        self._writing = self._pool.submit(self._write, state, progress, dict(metrics))

    def ready(self) -> bool:
        """Whether a checkpoint is whole and waits to be collected."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is None

    def failed(self) -> bool:
        """Whether a checkpoint could not be written: `collect` raises why."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def collect(self) -> Checkpoint | None:
        """The checkpoint that was started last, when it is whole; None where there is none to collect.

        Raises what `checkpoint.save` and `require_owner` raise.
        """
        writing, self._writing = self._writing, None
        return writing.result() if writing else None

    def close(self) -> None:
        """Wait until what was started is written."""
        self._pool.shutdown()

    def _write(self, state: EngineState, progress: Progress, metrics: dict[str, float]) -> Checkpoint:
        require_owner(self.config.run_dir, self.owner)
        about = {"config": self.config.model_dump(mode="json"), "versions": versions()}
        saved = checkpoint.save(self.config.run_dir, state, progress, metrics, about)
        prune(self.config, saved)
        return saved


def prune(config: RunConfig, saved: Checkpoint) -> None:
    """Delete the checkpoints that the run does not keep, and never the one just saved."""
    checkpoint.prune(config.run_dir, config.checkpoint.save_total_limit, config.checkpoint.keep_best, saved.step)
