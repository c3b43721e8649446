"""What happens after each step of a run: log it, list its samples, save and evaluate.

In: the StepInfo of the loop. Out: events, audit files, checkpoints and predictions. Rank 0 writes all but the audit.
"""

import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from smolray.config import RunConfig
from smolray.data.reader import Folders
from smolray.engine.base import Engine
from smolray.evaluate.evaluator import EvalReport
from smolray.evaluate.validation import evaluate_shards, headline, validation_loss
from smolray.run import checkpoint
from smolray.run.checkpoint import Checkpoint, Progress
from smolray.run.events import Event, EventLog
from smolray.run.predictions import write_predictions
from smolray.run.rates import ETA_STEPS, seconds_left
from smolray.train.audit import Audit
from smolray.train.collective import agree
from smolray.train.early_stopping import EarlyStopping
from smolray.train.saving import CheckpointWriter, prune
from smolray.train.step import Hook, StepInfo, metrics_fields

if TYPE_CHECKING:
    from smolray.train.trl import TrlRun


class RunLog:
    """The run's log on rank 0; on other ranks nothing is written."""

    def __init__(self, run_dir: str):
        self.log = EventLog(run_dir) if dist.get_rank() == 0 else None
        self._recent: deque[Event] = deque(maxlen=ETA_STEPS + 1)

    def event(self, kind: str, **fields: Any) -> None:
        """Add an event."""
        if self.log is not None:
            self.log.write(kind, **fields)

    def flush(self) -> None:
        """Write what has not been written. Raises StorageFullError."""
        if self.log is not None:
            self.log.flush()

    def step(self, step_info: StepInfo) -> None:
        """A hook: add a step, with the time that is left."""
        metrics = step_info.metrics
        self._recent.append({"step": metrics.step, "time": time.time(), "seconds": metrics.seconds})
        eta = seconds_left(list(self._recent), metrics.total_steps)
        self.event("step", **metrics_fields(metrics), eta_seconds=eta)

    def balanced(self, speeds: Sequence[float], counts: Sequence[int]) -> None:
        """Add the result of load balancing."""
        self.event("balance", tokens_per_second=[round(s, 1) for s in speeds], shares=list(counts))


def evaluates_at(config: RunConfig, progress: Progress, of_steps: bool = True) -> bool:
    """Whether a run evaluates at this position, beside its last step. `of_steps`: the step itself counts."""
    settings = config.evaluate
    end_of_epoch = progress.consumed == 0 and progress.epoch > 0
    of_epoch = end_of_epoch and settings.eval_epochs and progress.epoch % settings.eval_epochs == 0
    return bool(of_epoch or (of_steps and settings.eval_steps and progress.step % settings.eval_steps == 0))


class RunHooks:
    """The hooks of a run, and what they leave behind: the newest report, and whether the run was stopped."""

    def __init__(
        self,
        config: RunConfig,
        folders: Folders,
        device: torch.device,
        engine: "Engine | TrlRun",
        log: RunLog,
        audit: Audit | None,
        writer: CheckpointWriter,
        earlier: Sequence[float] = (),
    ):
        """`earlier`: the headlines of the evaluations of earlier attempts, the same on every worker."""
        settings = config.evaluate
        self.early_stopping = EarlyStopping(settings.early_stopping_patience, settings.early_stopping_threshold)
        self.early_stopping.add_history(earlier)
        self.config, self.folders, self.device, self.engine = config, folders, device, engine
        self.log, self.audit, self.writer = log, audit, writer
        self.report = EvalReport()
        self.stopped = False

    def in_order(self) -> list[Hook]:
        """The hooks, in the order in which the loop calls them."""
        return [hook for hook in (self.log.step, self.audit, self.save_and_evaluate) if hook is not None]

    def save_and_evaluate(self, step_info: StepInfo) -> None:
        """A hook: save at the end of epochs, every save_steps and before the run ends; evaluate where it is due."""
        config, step = self.config, step_info.progress.step
        every = config.checkpoint.save_steps
        periodic = every and step % every == 0 and not step_info.metrics.skipped
        evaluating = self._evaluation_is_due(step_info)
        saving = step_info.stopping or step_info.last or step_info.end_of_epoch or periodic or evaluating

        metrics: dict[str, float] = {"loss": step_info.metrics.loss}
        # Save first: an evaluation may need more memory than there is. Its error waits for the write (run_worker).
        if saving:
            self._start_saving(step_info.progress, metrics)
        elif self.writer.ready():
            self._announce(self.writer.collect())
        if evaluating:
            metrics["accuracy"] = headline(self.evaluate(step), config)
            self.early_stopping.add(metrics["accuracy"])
            if config.evaluate.loss and config.traits.validation_loss:
                with self.engine.gathered():
                    metrics["validation_loss"] = validation_loss(self.engine.model, config, self.folders, self.device)
        if evaluating or step_info.stopping or step_info.last:
            self._finish_saving(metrics)
        self.stopped = step_info.stopping and not step_info.last
        if self.enough() and evaluating and not step_info.last:
            self.log.event("early_stopping", step=step, best=self.early_stopping.best, worse=self.early_stopping.worse)

    def evaluate_missed(self, found: Checkpoint) -> None:
        """Evaluate a checkpoint that an earlier attempt saved for that and did not live to evaluate. Collective.

        Only where the evaluations decide how long the run is.
        """
        missing = self.folders.validation and self.config.evaluate.early_stopping_patience is not None
        if not missing or "accuracy" in found.metrics or not evaluates_at(self.config, found.progress):
            return
        metrics = found.metrics | {"accuracy": headline(self.evaluate(found.step), self.config)}
        self.early_stopping.add(metrics["accuracy"])
        agree(lambda: self._announce(found if dist.get_rank() == 0 else None, metrics))
        agree(self.log.flush)

    def enough(self) -> bool:
        """Whether the evaluations say that further training is not worth it. The same on every worker."""
        return self.early_stopping.reached

    def evaluate(self, step: int) -> EvalReport:
        """Evaluate the weights on the validation shards, and write the predictions. Collective."""
        self.log.event("evaluating", step=step)
        self.log.flush()
        with self.engine.gathered():
            report = evaluate_shards(self.engine.model, self.config, self.folders, self.device)
        self.report = report

        if dist.get_rank() == 0:
            write_predictions(self.config.run_dir, step, report.predictions)
        self.log.event(
            "evaluate",
            step=step,
            accuracy=report.accuracy,
            counts=report.counts,
            samples=report.samples,
            left_out=report.left_out,
            metrics=report.metrics,
        )
        for name, why in report.skipped.items():
            self.log.event("skipped", what=f"metric {name}", why=why)
        self.log.flush()
        return report

    def flush(self) -> None:
        """Write what has not been written. Raises StorageFullError."""
        if self.audit:
            self.audit.flush()
        self.log.flush()

    def _evaluation_is_due(self, step_info: StepInfo) -> bool:
        if not self.folders.validation or step_info.stopping:
            return False
        of_steps = step_info.progress.step > 0 and not step_info.metrics.skipped
        return step_info.last or evaluates_at(self.config, step_info.progress, of_steps)

    def _start_saving(self, progress: Progress, metrics: dict[str, float]) -> None:
        """Have rank 0 write a checkpoint while training goes on. Collective.

        The one before is whole by then. The log and the audit are written first: of a checkpoint that is found, they
        hold every step.
        """
        agree(lambda: self._announce(self.writer.collect()))
        state = self.engine.state()
        agree(self.flush)
        if dist.get_rank() == 0:
            self.writer.start(state, progress, metrics)

    def _finish_saving(self, metrics: dict[str, float]) -> None:
        """Wait for the checkpoint, and add to it what was measured meanwhile. Collective."""
        agree(lambda: self._announce(self.writer.collect(), metrics))
        agree(self.log.flush)

    def _announce(self, saved: Checkpoint | None, metrics: dict[str, float] | None = None) -> None:
        """Log a checkpoint that is whole; `metrics`: also what was measured since it was written. On rank 0."""
        if saved is None:
            return

        if metrics is not None and metrics != saved.metrics:
            saved = checkpoint.annotate(saved, metrics)
            prune(self.config, saved)  # the best one may be another now
        self.log.event("checkpoint", step=saved.step, path=saved.uri, **saved.metrics)
