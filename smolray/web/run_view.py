"""What the page of a run shows, read as it grows: only what is new in its log, its newest answers once.

In: the folder of a run. Out: RunContents (report/sections.py), and validation images.
"""

import threading
from collections import OrderedDict
from contextlib import suppress
from typing import Any

import pyarrow.parquet as pq

from smolray import storage
from smolray.config import ConfigError, RunConfig, load_config
from smolray.data.formats.source import SourceError
from smolray.data.prepare import shard_folder
from smolray.data.shards import ShardError, read_manifest
from smolray.report.run import read_images, stored_settings
from smolray.report.sections import RunContents
from smolray.run.events import Event, EventTail
from smolray.run.folder import RunFolder
from smolray.run.predictions import prediction_steps, read_predictions
from smolray.run.result import read_result

KEPT = 8  # runs whose logs are in memory
PICTURES = 24


class RunView:
    """One run for all its readers."""

    def __init__(self, folder: RunFolder):
        self.folder = folder
        self._lock = threading.Lock()
        self._tail = EventTail(folder.uri)
        self._events: list[Event] = []
        self._read: tuple[int, float] | None = None  # the step of the answers, and when they were written
        self._predictions: list[dict[str, Any]] = []
        self.images: dict[str, bytes] = {}

    def contents(self) -> RunContents:
        """The run as it is now. Raises RunFileError where a file is damaged."""
        with self._lock:
            self._events += self._tail.new()
            config = stored_settings(self.folder.config)
            self._read_answers(config)
            return RunContents(
                name=self.folder.name,
                events=list(self._events),
                result=read_result(self.folder.uri),
                config=config,
                predictions=self._predictions,
                images=self.images,
            )

    def _read_answers(self, config: dict[str, Any]) -> None:
        """The newest answers, with images: those of the report, or before there is one the first of the shards."""
        steps = prediction_steps(self.folder.uri)
        newest = (steps[-1], storage.modified(self.folder.predictions_of(steps[-1]))) if steps else None
        if newest is None or newest == self._read:
            return
        self._read, self._predictions = newest, read_predictions(self.folder.uri, newest[0])
        self.images = read_images(self.folder.uri) or self.images
        if not self.images:
            with suppress(ConfigError, SourceError, ShardError, OSError):
                self.images = first_images(load_config(None, base=config))


class RunViews:
    """The runs that were looked at last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._views: OrderedDict[str, RunView] = OrderedDict()

    def of(self, folder: RunFolder) -> RunView:
        """The view of one run."""
        with self._lock:
            view = self._views.pop(folder.uri, None) or RunView(folder)
            self._views[folder.uri] = view
            while len(self._views) > KEPT:
                self._views.popitem(last=False)
            return view


def first_images(config: RunConfig, count: int = PICTURES) -> dict[str, bytes]:
    """The first validation images by key. Raises SourceError and ShardError where the data is not there."""
    if not config.data.validation:
        return {}
    folder = shard_folder(config, "validation")
    found: dict[str, bytes] = {}
    for shard in read_manifest(folder).files:
        fs, path = storage.filesystem(storage.join(folder, shard.name))
        file = pq.ParquetFile(fs.open_input_file(path))
        for group in range(file.num_row_groups):
            for row in file.read_row_group(group, ["key", "images"]).to_pylist():
                if row["images"]:
                    found[row["key"]] = row["images"][0]
                if len(found) >= count:
                    return found
    return found
