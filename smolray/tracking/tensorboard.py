"""TensorBoard's files, in the run's folder or in TENSORBOARD_LOGGING_DIR."""

import io
import os
import time
from collections.abc import Sequence
from typing import Any

import yaml

from smolray import storage
from smolray.run.folder import RunFolder
from smolray.tracking.base import Point, Sample, TrackedRun


def logging_dir(run_dir: str) -> str:
    """The local folder of the event files; empty where the run is not on a local disk and no folder is named."""
    if named := os.environ.get("TENSORBOARD_LOGGING_DIR"):
        return named
    return storage.absolute(RunFolder(run_dir).tensorboard) if storage.is_local(run_dir) else ""


class TensorBoard:
    """Scalars, images with their answers, and the settings as text. The id of a run is its folder."""

    def start(self, run: TrackedRun, known: str) -> tuple[str, str]:
        from tensorboardX import SummaryWriter

        folder = logging_dir(run.run_dir)
        # files of one second would have the same name
        self.writer: Any = SummaryWriter(folder, filename_suffix=f".{time.monotonic_ns()}")
        if known != folder:
            self.writer.add_text("settings", f"```\n{yaml.safe_dump(run.settings, sort_keys=False)}```", 0)
        return folder, folder

    def log(self, points: Sequence[Point]) -> None:
        for point in points:
            for name, value in point.values.items():
                self.writer.add_scalar(name, value, global_step=point.step, walltime=point.time)
        self.writer.flush()

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        import numpy as np
        from PIL import Image

        for number, sample in enumerate(samples):
            tag = f"samples/{number}"
            if sample.image is not None:
                pixels = np.asarray(Image.open(io.BytesIO(sample.image)).convert("RGB"))
                self.writer.add_image(tag, pixels, step, dataformats="HWC")
            mark = "right" if sample.correct else "wrong"
            text = f"{sample.question}\n\n**{sample.prediction}** ({mark}; expected: {sample.answer})"
            self.writer.add_text(tag, text, step)

    def checkpoint(self, step: int, uri: str) -> None:
        self.writer.add_text("checkpoint", uri, step)

    def end(self, status: str) -> None:
        self.writer.close()
