"""Weights & Biases. The library reads its own WANDB_… variables; WANDB_PROJECT is `smolray` where it is not set."""

import io
import os
import secrets
from collections.abc import Sequence
from typing import Any

from smolray.tracking.base import Point, Sample, TrackedRun

INIT_SECONDS = FINISH_SECONDS = 60.0
COLUMNS: list[str | int] = ["image", "question", "prediction", "answer", "correct"]


class Wandb:
    """One run of wandb; its id is `project/id`. The x-axis of all curves is train/global_step, as in transformers."""

    def start(self, run: TrackedRun, known: str) -> tuple[str, str]:
        import wandb

        project = os.environ.get("WANDB_PROJECT", "smolray")
        was, _, own = known.rpartition("/")
        self.run: Any = wandb.init(
            project=project,
            name=run.name,
            group=run.group or os.environ.get("WANDB_RUN_GROUP"),
            id=own if own and was == project else secrets.token_hex(4),
            resume="allow",
            reinit="create_new",
            config=run.settings,
            allow_val_change=True,
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=INIT_SECONDS,
                finish_timeout=FINISH_SECONDS,
                finish_timeout_raises=False,
            ),
        )
        self.run.define_metric("train/global_step")
        self.run.define_metric("*", step_metric="train/global_step", step_sync=True)
        return f"{project}/{self.run.id}", str(
            self.run.dir.removesuffix("/files") if self.run.offline else self.run.url
        )

    def log(self, points: Sequence[Point]) -> None:
        for point in points:
            self.run.log({**point.values, "train/global_step": point.step, "_timestamp": point.time})

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        import wandb
        from PIL import Image

        rows = [
            [
                wandb.Image(Image.open(io.BytesIO(s.image)).convert("RGB")) if s.image is not None else None,
                s.question,
                s.prediction,
                s.answer,
                s.correct,
            ]
            for s in samples
        ]
        self.run.log({"samples": wandb.Table(columns=COLUMNS, data=rows), "train/global_step": step})

    def checkpoint(self, step: int, uri: str) -> None:
        self.run.summary.update({"checkpoint": uri, "checkpoint_step": step})

    def end(self, status: str) -> None:
        self.run.finish(exit_code=int(status == "failed"))
