"""What a tracker receives of a run's log, and what is remembered of it.

In: events. Out: points, samples and checkpoints for a Tracker (base.py); in the run's folder its id and how many events
it has, so that a resumed run continues there.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

from smolray import storage
from smolray.run.events import Event
from smolray.run.folder import RunFolder
from smolray.run.predictions import read_predictions
from smolray.tracking.base import Sample, TrackedRun, Tracker
from smolray.tracking.points import point_of

Images = Callable[[], dict[str, bytes]]  # a few validation images by the key of their row


class TrackerConsumer:
    """Hands a run to one tracker. `images` is called once, at the first evaluation."""

    def __init__(self, name: str, tracker: Tracker, run: TrackedRun, images: Images):
        self.name, self.tracker, self.tracked, self._find_images = name, tracker, run, images
        self.remedy = f"`smolray track {run.name} {name}` sends what is missing"
        self.file = RunFolder(run.run_dir).tracker(name)
        self._images: dict[str, bytes] | None = None
        self._id = ""

    def start(self) -> tuple[int, str]:
        kept = self._kept()
        self._id, place = self.tracker.start(self.tracked, kept.get("id", ""))
        received = kept["received"] if kept.get("id") == self._id else 0
        self._keep(received)
        return received, place

    def take(self, events: Sequence[Event], received: int) -> None:
        if points := [point for event in events if (point := point_of(event))]:
            self.tracker.log(points)
        for event in events:
            if event["event"] == "evaluate" and (samples := self._samples(event["step"])):
                self.tracker.samples(event["step"], samples)
        saved = [event for event in events if event["event"] == "checkpoint"]
        if saved:
            self.tracker.checkpoint(saved[-1]["step"], saved[-1]["path"])
        self._keep(received)

    def idle(self) -> None:
        pass

    def end(self, status: str) -> None:
        self.tracker.end(status)

    def _samples(self, step: int) -> list[Sample]:
        """The answers to the questions about the images that are shown."""
        if self._images is None:
            self._images = self._find_images()
        try:
            predictions = read_predictions(self.tracked.run_dir, step)
        except FileNotFoundError:
            return []
        shown = [p for p in predictions if p["key"] in self._images][: len(self._images)]
        return [
            Sample(p["question"], p["answer"], p["prediction"], p["correct"], self._images[p["key"]]) for p in shown
        ]

    def _kept(self) -> dict[str, Any]:
        return json.loads(storage.read_bytes(self.file)) if storage.exists(self.file) else {}  # type: ignore[no-any-return]

    def _keep(self, received: int) -> None:
        storage.write_bytes(self.file, json.dumps({"id": self._id, "received": received}).encode())
