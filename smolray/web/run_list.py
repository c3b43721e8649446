"""All runs of a storage folder, read again only where something has changed.

In: a storage folder, local or s3://. Out: their statuses, as `smolray status` has them. Whoever asks gets what is known
by then: a page never waits for two hundred logs.
"""

import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from smolray import storage
from smolray.run.folder import RunFolder, log_parts
from smolray.run.queue import Entry, read_queue
from smolray.run.result import RunFileError
from smolray.run.status import RunStatus, run_status
from smolray.web.files import is_inside

THREADS = 4
LIVE_SECONDS = 10.0  # a run that has not ended may stall, or lose its driver, without a new event
RESTING_SECONDS = 30.0  # object storage: between two looks at a run that has ended


@dataclass(frozen=True)
class Known:
    """What is known of one folder. `status`: None where it holds no run."""

    signature: tuple[Any, ...]
    read: float
    status: RunStatus | None


class RunList:
    """The runs of one storage folder, for many readers."""

    def __init__(self, root: str):
        self.root = storage.absolute(root)
        self.poll = 1.0 if storage.is_local(root) else 5.0
        self._known: dict[str, Known] = {}
        self._names: list[str] = []
        self._lock = threading.Lock()
        self._look: Future[None] | None = None
        self._looked = 0.0
        self._looker = ThreadPoolExecutor(1, "runs")
        self._readers = ThreadPoolExecutor(THREADS, "run")
        self.error = ""
        self.queue: list[Entry] = []  # as of the newest look

    def look(self, patience: float | None = 0.5) -> list[RunStatus]:
        """The runs, those that have not ended first. Waits at most `patience` seconds for what is new; None: for it."""
        with self._lock:
            over = self._look is None or self._look.done()
            if over and time.monotonic() - self._looked >= self.poll:
                self._look = self._looker.submit(self._refresh)
            look = self._look
        if look is not None:
            try:
                look.result(patience)
            except TimeoutError:
                pass
            except OSError as error:
                self.error = str(error)
        found = (self._known.get(name) for name in list(self._names))
        return sorted((k.status for k in found if k and k.status), key=_order)

    @property
    def unread(self) -> int:
        """Folders that have not been looked at yet."""
        return sum(name not in self._known for name in list(self._names))

    def status(self, name: str) -> RunStatus | None:
        """One run as it is now."""
        self._read(name)
        known = self._known.get(name)
        return known.status if known else None

    def _refresh(self) -> None:
        try:
            names = storage.list_dirs(self.root)
            self._names = names
            self.queue = read_queue(self.root)
            list(self._readers.map(self._read, self._newest_first(names)))
            for gone in set(self._known) - set(names):
                self._known.pop(gone, None)
            self.error = ""
        finally:
            self._looked = time.monotonic()

    def _newest_first(self, names: Iterable[str]) -> list[str]:
        """Those that are known first: they are what a page shows now."""
        return sorted(names, key=lambda name: name not in self._known)

    def _read(self, name: str) -> None:
        known, now = self._known.get(name), time.monotonic()
        ended = known is not None and (known.status is None or known.status.ended)
        if known and ended and not storage.is_local(self.root) and now - known.read < RESTING_SECONDS:
            return
        folder = RunFolder(storage.join(self.root, name))
        signature = _signature(folder)
        if known and known.signature == signature and (ended or now - known.read < LIVE_SECONDS):
            return
        self._known[name] = Known(signature, now, self._status(folder) if any(signature) else None)

    def _status(self, folder: RunFolder) -> RunStatus | None:
        if not is_inside(self.root, folder.uri) or not folder.is_run():
            return None
        try:
            return run_status(folder.uri)
        except RunFileError as error:
            return RunStatus(folder.name, folder.uri, "failed", error=str(error))


def _signature(folder: RunFolder) -> tuple[Any, ...]:
    """What changes with the status of a run; empty values where there is nothing."""
    fs, _ = storage.filesystem(folder.uri)
    files = (folder.config, folder.events, folder.result, folder.stop_flag)
    found = fs.get_file_info([storage.filesystem(uri)[1] for uri in files])
    seen = [(info.size or 0, info.mtime_ns or 0) if info.is_file else None for info in found]
    parts = None
    if not storage.is_local(folder.uri):
        parts = tuple((f.path, f.size) for f in storage.list_files(log_parts(folder.uri))) or None
    return (*seen, parts)


def _order(run: RunStatus) -> tuple[bool, float, str]:
    """What goes on first, and in it the newest start: rows do not change places with every step."""
    return run.ended, -((run.updated if run.ended else run.started) or 0), run.name
