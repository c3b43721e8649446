"""The queue of a storage: which run trains next where several share a cluster.

In: runs with `resources.queue`, each from its driver. Out: their order: by priority, then fairly between users (who has
fewer runs that train or stand ahead comes first), then by age.

A run's entry is a small file, `<storage>/.queue/NAME.json`. Whether its driver lives is known by the lease of the run.
An entry without a driver keeps its age: when the run is submitted again it has its old place.
"""

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from smolray import storage
from smolray.run.events import STARTING, EventTail
from smolray.run.lease import STALE_SECONDS, gone_owner, read_owner

FOLDER = ".queue"  # no run can have this name


@dataclass(frozen=True)
class Entry:
    """A run in the queue. `since`: when it was queued; `turn`: when it was allowed to start, 0 before."""

    run: str
    user: str
    priority: int
    since: float
    workers: int
    turn: float = 0.0
    lost: bool = False  # its driver is gone; not stored

    @property
    def waits(self) -> bool:
        """Whether it stands in line."""
        return not self.turn and not self.lost


def enter(root: str, run: str, user: str, priority: int, workers: int) -> Entry:
    """Put a run in the queue of the storage `root`, with the age of its entry where there is one."""
    known = _read(_file(root, run))
    entry = Entry(run, user, priority, known.since if known else round(time.time(), 3), workers)
    _write(root, entry)
    return entry


def start(root: str, entry: Entry) -> None:
    """Note that a run has its turn."""
    _write(root, replace(entry, turn=round(time.time(), 3)))


def leave(root: str, run: str) -> None:
    """Take a run out of the queue. It may have left before."""
    storage.delete(_file(root, run))


def read_queue(root: str) -> list[Entry]:
    """All entries: those whose turn it was, then the line in its order, then those whose driver is gone."""
    uri, found = storage.join(root, FOLDER), []
    for info in storage.list_files(uri):
        if (entry := _read(storage.join(uri, info.base_name))) is not None:
            found.append(replace(entry, lost=_is_lost(storage.join(root, entry.run))))
    return in_order(found)


def in_order(entries: Sequence[Entry]) -> list[Entry]:
    """The entries in the order of `read_queue`."""
    started = sorted((e for e in entries if e.turn and not e.lost), key=lambda e: e.turn)
    lost = sorted((e for e in entries if e.lost), key=lambda e: e.since)
    ahead = Counter(e.user for e in started)
    left, line = [e for e in entries if e.waits], []
    while left:
        first = min(left, key=lambda e: (-e.priority, ahead[e.user], e.since, e.run))
        ahead[first.user] += 1
        line.append(first)
        left.remove(first)
    return [*started, *line, *lost]


def places(entries: Sequence[Entry]) -> list[tuple[str, Entry]]:
    """The entries of `read_queue` with their places: 1, 2, …, `trains`, or `lost`."""
    line = [entry.run for entry in entries if entry.waits]
    return [
        ("lost" if entry.lost else "trains" if entry.turn else str(line.index(entry.run) + 1), entry)
        for entry in entries
    ]


class Line:
    """The queue as one run sees it, again and again while it waits."""

    def __init__(self, root: str, run: str):
        self.root, self.run = root, run
        self._training: set[tuple[str, float]] = set()  # (run, turn): their logs, which grow, are not read again

    def place(self) -> tuple[int, int, str]:
        """(place, length of the line, the run that is starting); its place is 1 where it is the next."""
        entries = read_queue(self.root)
        line = [e.run for e in entries if e.waits]
        starting = next((e.run for e in entries if e.turn and not e.lost and self._is_starting(e)), "")
        return line.index(self.run) + 1 if self.run in line else 1, len(line), starting

    def _is_starting(self, entry: Entry) -> bool:
        """Whether the workers of a run whose turn it is do not train yet: nobody else may take what is free then."""
        if (turn := (entry.run, entry.turn)) in self._training:
            return False
        events = EventTail(storage.join(self.root, entry.run)).new()
        if events and events[-1]["event"] not in STARTING:
            self._training.add(turn)
            return False
        return True


def _is_lost(run_dir: str) -> bool:
    return read_owner(run_dir) is None or gone_owner(run_dir, time.time(), STALE_SECONDS) is not None


def _file(root: str, run: str) -> str:
    return storage.join(root, FOLDER, f"{run}.json")


def _read(uri: str) -> Entry | None:
    try:
        return Entry(**json.loads(storage.read_bytes(uri)))
    except (FileNotFoundError, ValueError, TypeError):  # it left, or is no entry
        return None


def _write(root: str, entry: Entry) -> None:
    record = {key: value for key, value in asdict(entry).items() if key != "lost"}
    storage.write_bytes(_file(root, entry.run), json.dumps(record).encode())
