"""Trackio: a local store, a Space or a server, by its own TRACKIO_… variables.

TRACKIO_PROJECT is `smolray` where it is not set.
"""

import io
import os
from collections.abc import Sequence
from typing import Any

from smolray.tracking.base import Point, Sample, TrackedRun


class Trackio:
    """One run of Trackio; its id is `project/name`."""

    def start(self, run: TrackedRun, known: str) -> tuple[str, str]:
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", "smolray")
        self.run: Any = trackio.init(
            project=project,
            name=run.name,
            group=run.group or None,
            config=run.flat_settings(),
            resume="allow",
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return f"{project}/{run.name}", f"trackio show --project {project}"

    def log(self, points: Sequence[Point]) -> None:
        for point in points:
            self.run.log({**point.values, "train/global_step": point.step}, step=point.step)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        import trackio
        from PIL import Image

        rows = [
            [
                trackio.Image(Image.open(io.BytesIO(s.image)).convert("RGB")) if s.image is not None else "",
                s.question,
                s.prediction,
                s.answer,
                s.correct,
            ]
            for s in samples
        ]
        columns = ["image", "question", "prediction", "answer", "correct"]
        self.run.log({"samples": trackio.Table(columns=columns, data=rows)}, step=step)

    def checkpoint(self, step: int, uri: str) -> None:
        self.run.log({"checkpoint": uri}, step=step)

    def end(self, status: str) -> None:
        self.run.finish()
