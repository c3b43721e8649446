"""The lease of a run: one process at a time writes into its folder: trains, evaluates or exports.

In: the folder of a run or a search. Out: `control/owner.json` in it, which names the driver and is written again every
few seconds; it is deleted when the driver ends.

How it holds. On a local disk, and on network disks that lock, looking and writing is one step, under flock. Object
storage has no conditional write here: a driver writes a claim, waits, and reads all claims; the oldest by the storage's
own clock wins. That holds as long as a write of some hundred bytes is visible to all within SETTLE_SECONDS. A driver
that finds another's name in the file has lost the lease, and stops writing; workers look before each checkpoint. Ages
are measured by the storage's clock, not by those of machines.
"""

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from smolray import storage
from smolray.run.events import read_events
from smolray.run.folder import EVENTS, RunFolder

BEAT_SECONDS = 5.0  # between two writes of the owner's file
STALE_SECONDS = 30.0  # an owner that has not written for so long is gone
SETTLE_SECONDS = 3.0  # object storage: between writing a claim and reading all of them
TRAINING = ("train", "tune")  # what an owner does for hours; the others evaluate and export
ENDING_SECONDS = 60.0  # how long a driver whose run has ended may still write its report


class LeaseError(ValueError):
    """Another driver owns the run; the message says which, since when, and how to take over."""


class LeaseLostError(ValueError):
    """This driver does not own the run any more: another one has taken it over."""


@dataclass(frozen=True)
class Owner:
    """A driver: its process, what it does, and since when. `boot` and `started` tell processes of one number apart."""

    id: str
    what: str
    host: str
    pid: int
    boot: str
    started: str
    since: float

    @classmethod
    def here(cls, what: str) -> "Owner":
        """This process."""
        host, pid = socket.gethostname(), os.getpid()
        return cls(uuid.uuid4().hex, what, host, pid, _boot(), _started(pid), round(time.time(), 3))

    @property
    def gone(self) -> bool:
        """Whether its process certainly is not there any more: seen on its own machine only."""
        here = self.host == socket.gethostname() and self.boot == _boot() and bool(self.boot)
        return here and _started(self.pid) != self.started

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.since))
        return f"`smolray {self.what}`, process {self.pid} on {self.host}, since {since}"


def _boot() -> str:
    """Names this boot of this kernel and the namespace that counts processes; empty where there is none (not Linux)."""
    with suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _started(pid: int) -> str:
    """When a process was started, in ticks since boot; empty where it is not there, or has ended."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    return ""


@dataclass(frozen=True)
class Seen:
    """An owner's file as it was read: `written` by the storage's clock."""

    owner: Owner
    written: float


def read_owner(run_dir: str) -> Seen | None:
    """The owner of a run and when its file was written; None where there is none."""
    uri = RunFolder(run_dir).owner
    try:
        record, written = json.loads(storage.read_bytes(uri)), storage.modified(uri)
        return Seen(Owner(**record), written)
    except (FileNotFoundError, ValueError, TypeError):  # deleted, or not ours
        return None


def gone_owner(run_dir: str, now: float, quiet: float) -> Owner | None:
    """The owner of a run where it is gone, or has not written for `quiet` seconds.

    None where it lives, or there is none.
    """
    seen = read_owner(run_dir)
    return seen.owner if seen is not None and (seen.owner.gone or now - seen.written > quiet) else None


def is_owner(run_dir: str, owner: str) -> bool:
    """Whether the run belongs to the driver of this id; "": nobody asks."""
    return not owner or ((seen := read_owner(run_dir)) is not None and seen.owner.id == owner)


def require_owner(run_dir: str, owner: str) -> None:
    """Raise LeaseLostError where the run belongs to another driver than the one of this id."""
    if not is_owner(run_dir, owner):
        raise LeaseLostError(_lost(run_dir, read_owner(run_dir)))


@contextmanager
def owning(run_dir: str, what: str, say: Callable[[str], None] = print, log: str = EVENTS) -> Iterator["Lease"]:
    """A block in which this process owns the run. Raises LeaseError where another one does.

    `log`: the file of its events. A driver whose run has ended only writes its report, and is waited for.
    """
    lease = Lease(run_dir, Owner.here(what), log)
    lease.take(say)
    over = threading.Event()
    beat = threading.Thread(target=lease.beat, args=(over,), daemon=True)
    beat.start()
    try:
        yield lease
    finally:
        over.set()
        beat.join()
        lease.release()


class Lease:
    """The right of one process to write into one run."""

    def __init__(self, run_dir: str, owner: Owner, log: str = EVENTS) -> None:
        self.run_dir, self.owner, self.log = run_dir, owner, log
        self.uri = RunFolder(run_dir).owner
        self.lost = threading.Event()

    @property
    def id(self) -> str:
        return self.owner.id

    def take(self, say: Callable[[str], None] = print) -> None:
        """Become the owner, where there is none or it is gone. Raises LeaseError."""
        seen = self._free(say)
        if storage.is_local(self.run_dir):
            with _locked(self.run_dir):
                self._require_unchanged(seen)
                self._write()
            return
        claim = self._claim()
        try:
            self._require_unchanged(seen)
            self._write()
        finally:
            storage.delete(claim)

    def loss(self) -> LeaseLostError | None:
        """The error of a driver whose run another process has taken over; None where it is ours."""
        return LeaseLostError(_lost(self.run_dir, read_owner(self.run_dir))) if self.lost.is_set() else None

    def beat(self, over: threading.Event) -> None:
        """Write the file again until `over`, or until it is another's."""
        while not over.wait(BEAT_SECONDS):
            try:
                with _locked(self.run_dir) if storage.is_local(self.run_dir) else nullcontext():
                    seen = read_owner(self.run_dir)
                    if seen is None or seen.owner.id != self.id:
                        self.lost.set()
                        return
                    self._write()
            except OSError:
                continue  # a storage that is away: nobody can take the run over either

    def release(self) -> None:
        """Delete the file, so that the next start need not wait."""
        with suppress(OSError):
            seen = read_owner(self.run_dir)
            if seen is not None and seen.owner.id == self.id:
                storage.delete(self.uri)

    def _write(self) -> None:
        storage.write_bytes(self.uri, json.dumps(asdict(self.owner)).encode())

    def _free(self, say: Callable[[str], None]) -> Seen | None:
        """Wait until the run has no living owner; returns the one that is gone. Raises LeaseError."""
        seen = first = read_owner(self.run_dir)
        deadline, told = time.monotonic() + ENDING_SECONDS, False
        while seen is not None and not self._is_gone(seen):
            assert first is not None
            ending = seen.owner.what in TRAINING and self._has_ended()
            beats = seen.owner.id != first.owner.id or seen.written != first.written
            if (not ending and (beats or seen.owner.boot == _boot())) or time.monotonic() > deadline:
                raise LeaseError(self._refusal(seen.owner))
            if not told:
                doing = "is writing its report" if ending else "has not given a sign of life yet"
                say(f"waiting: {RunFolder(self.run_dir).name} belongs to {seen.owner}, which {doing}")
                told = True
            time.sleep(0.5)
            seen = read_owner(self.run_dir)
        return seen

    def _is_gone(self, seen: Seen) -> bool:
        return seen.owner.gone or self._now() - seen.written > STALE_SECONDS

    def _has_ended(self) -> bool:
        """Whether the newest event is the end."""
        events = read_events(self.run_dir, self.log)
        return bool(events) and events[-1]["event"] in ("end", "over")

    def _now(self) -> float:
        """The time by the storage's own clock."""
        probe = f"{self.uri}.{self.id}.clock"
        storage.write_bytes(probe, b"")
        try:
            return storage.modified(probe)
        finally:
            storage.delete(probe)

    def _require_unchanged(self, before: Seen | None) -> None:
        """Raise LeaseError where another start was faster."""
        now = read_owner(self.run_dir)
        if now is not None and (before is None or now.owner.id != before.owner.id):
            raise LeaseError(self._refusal(now.owner))

    def _refusal(self, owner: Owner | str) -> str:
        """Who owns the run, and what to do about it."""
        folder = RunFolder(self.run_dir)
        remedy = f"`smolray stop {folder.name} --storage {self.run_dir.rsplit('/', 1)[0]}` saves and stops it"
        if isinstance(owner, Owner) and owner.what not in TRAINING:
            remedy = "Wait until it has ended"
        elif self.owner.what in TRAINING:
            remedy += "; take another name for another run"
        elif self.owner.what == "export":
            remedy += "; `--out FOLDER` exports its newest weights beside it"
        return (
            f"{folder.name} belongs to {owner}. {remedy}. If that process is gone, start again after "
            f"{STALE_SECONDS:.0f} s; to take the run over at once, delete {folder.owner}"
        )

    def _claim(self) -> str:
        """Write a claim and wait; returns its URI where it is the oldest. Raises LeaseError where another one is."""
        folder = RunFolder(self.run_dir).claims
        mine = storage.join(folder, f"{self.id}.json")
        storage.write_bytes(mine, json.dumps(asdict(self.owner)).encode())
        time.sleep(SETTLE_SECONDS)

        times = {file.base_name: file.mtime.timestamp() for file in storage.list_files(folder)}
        own = times.get(f"{self.id}.json", time.time())
        # one of a start that was killed stays behind
        rivals = [(t, name) for name, t in times.items() if own - t < STALE_SECONDS]
        first = min(rivals, default=(own, f"{self.id}.json"))[1]
        if first != f"{self.id}.json":
            rival: Owner | str = "another start of it at the same time"
            with suppress(FileNotFoundError, ValueError, TypeError):  # its claim is deleted once it owns the run
                rival = Owner(**json.loads(storage.read_bytes(storage.join(folder, first))))
            storage.delete(mine)
            raise LeaseError(self._refusal(rival))
        return mine


@contextmanager
def _locked(run_dir: str) -> Iterator[None]:
    """A block that only one process at a time is in."""
    path = Path(storage.absolute(RunFolder(run_dir).owner_lock))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        with suppress(OSError):  # a network disk without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _lost(run_dir: str, seen: Seen | None) -> str:
    by = f"{seen.owner} has taken it over" if seen else f"{RunFolder(run_dir).owner} was deleted"
    return f"{RunFolder(run_dir).name} does not belong to this process any more: {by}. Nothing more is written here"
