"""SwanLab, by its own SWANLAB_… variables; SWANLAB_PROJECT is `smolray` where it is not set."""

import io
import os
from collections.abc import Sequence
from typing import Any

from smolray.tracking.base import Point, Sample, TrackedRun

STATE = {"finished": "success", "stopped": "aborted", "failed": "crashed"}


class SwanLab:
    """One run of SwanLab; its id is SwanLab's. Only its cloud continues a run: elsewhere a resume begins another."""

    def start(self, run: TrackedRun, known: str) -> tuple[str, str]:
        import swanlab

        project = os.environ.get("SWANLAB_PROJECT", "smolray")
        online = os.environ.get("SWANLAB_MODE", "online") in ("online", "cloud")
        again = {"id": known, "resume": "allow"} if known and online else {}
        settings: Any = {"project": project, "name": run.name, "group": run.group or None, **again}
        self.run: Any = swanlab.init(config=run.settings, reinit=True, **settings)
        return str(self.run.id), self.run.url if online else f"project {project}"

    def log(self, points: Sequence[Point]) -> None:
        import swanlab

        for point in points:
            swanlab.log(point.values, step=point.step)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        import swanlab
        from PIL import Image

        pictures = [
            swanlab.Image(
                Image.open(io.BytesIO(s.image)).convert("RGB"),
                caption=f"{s.question} -> {s.prediction} ({'right' if s.correct else f'expected: {s.answer}'})",
            )
            for s in samples
            if s.image is not None
        ]
        if pictures:
            swanlab.log({"samples": pictures}, step=step)

    def checkpoint(self, step: int, uri: str) -> None:
        import swanlab

        swanlab.log({"checkpoint": swanlab.Text(uri)}, step=step)

    def end(self, status: str) -> None:
        import swanlab

        state: Any = STATE[status]
        swanlab.finish(state=state, error="the run failed" if status == "failed" else None)
