"""MLflow, by its client.

The library reads MLFLOW_TRACKING_URI and the rest; MLFLOW_EXPERIMENT_NAME is `smolray` where it is not set.
"""

import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from smolray.tracking.base import Point, Sample, TrackedRun

MOST_METRICS, MOST_PARAMS, LONGEST_PARAM = 1000, 100, 500  # of one request, and of a value
STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MLflow:
    """One run of MLflow; its id is MLflow's. A run that its server does not know becomes a new one."""

    def start(self, run: TrackedRun, known: str) -> tuple[str, str]:
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        self.client: Any = MlflowClient()
        self.id = ""
        if found := known or os.environ.get("MLFLOW_RUN_ID"):
            try:
                self.id = self.client.get_run(found).info.run_id
                self.client.update_run(self.id, status="RUNNING")
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        if not self.id:
            tags = {"group": run.group} if run.group else {}
            self.id = self.client.create_run(self._experiment(), run_name=run.name, tags=tags).info.run_id
            params = [Param(key, str(value)[:LONGEST_PARAM]) for key, value in run.flat_settings().items()]
            for first in range(0, len(params), MOST_PARAMS):
                self.client.log_batch(self.id, params=params[first : first + MOST_PARAMS])
        return self.id, f"{self.client.tracking_uri} run {self.id}"

    def log(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, round(point.time * 1000), point.step)
            for point in points
            for name, value in point.values.items()
        ]
        for first in range(0, len(metrics), MOST_METRICS):
            self.client.log_batch(self.id, metrics=metrics[first : first + MOST_METRICS])

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        from PIL import Image

        told = [asdict(sample) | {"image": None} for sample in samples]
        for number, sample in enumerate(samples):
            if sample.image is not None:
                told[number]["image"] = f"samples/step-{step:08d}/{number}.png"
                image = Image.open(io.BytesIO(sample.image)).convert("RGB")
                self.client.log_image(self.id, image, artifact_file=told[number]["image"])
        text = json.dumps(told, indent=1, ensure_ascii=False)
        self.client.log_text(self.id, text, f"samples/step-{step:08d}.json")

    def checkpoint(self, step: int, uri: str) -> None:
        self.client.set_tag(self.id, "checkpoint", uri)

    def end(self, status: str) -> None:
        self.client.set_terminated(self.id, STATUS[status])

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "smolray")
        found = self.client.get_experiment_by_name(name)
        return found.experiment_id if found else self.client.create_experiment(name)
