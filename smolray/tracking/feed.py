"""Carries a run's log to its trackers and callbacks, each in a thread of its own.

In: the events that the run writes. Out: calls of a consumer. The log is the queue: a consumer that is slow, away or
failing reads on from where it was, and nothing is dropped. The run never waits for one, except at its end, for as long
as `fed` is told.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from smolray import storage
from smolray.run.events import Event, EventTail, read_events, surviving

LOCAL_SECONDS, REMOTE_SECONDS = 5.0, 15.0  # between two looks at the log: a look costs a tracker more than a step
RETRY_SECONDS, MOST_RETRY_SECONDS = 10.0, 300.0
CHUNK = 1000  # events handed over together

Say = Callable[[str], None]


class Consumer(Protocol):
    """What a feed hands events to. It may raise whatever it wants."""

    name: str
    remedy: str  # how to hand it what it has not received; empty: not at all

    def start(self) -> tuple[int, str]:
        """Begin. Returns how many events of the log it has received before, and what to tell people."""
        ...

    def take(self, events: Sequence[Event], received: int) -> None:
        """Receive events; `received`: how many of the log it then has."""
        ...

    def idle(self) -> None:
        """Nothing was written since the last call."""
        ...

    def end(self, status: str) -> None:
        """The run has ended: finished, stopped or failed."""
        ...


class Feed(threading.Thread):
    """Hands the events of one run to one consumer until `close`; what it raises is told by `say` and tried again."""

    def __init__(self, run_dir: str, consumer: Consumer, say: Say):
        super().__init__(daemon=True, name=f"feed of {consumer.name}")
        self.run_dir, self.consumer, self.say = run_dir, consumer, say
        self.status = "failed"
        self.complete = False  # the consumer has received everything, and has ended
        self._over = threading.Event()
        self._tail: EventTail | None = None
        self._unsent: list[tuple[int, Event]] = []  # each with its number in the log, from 1
        self._read = self._failures = 0

    def close(self, status: str) -> None:
        """Let the feed hand over what is left and end. Returns at once."""
        self.status = status
        self._over.set()

    def run(self) -> None:
        """Follow the log until `close`. Never raises."""
        poll = LOCAL_SECONDS if storage.is_local(self.run_dir) else REMOTE_SECONDS
        while True:
            last = self._over.is_set()  # looked at first: nothing that is written before the end is missed
            wait = poll
            try:
                self._hand_over()
                if last:
                    self.consumer.end(self.status)
                    self.complete = True
                self._failures = 0
            except (Exception, SystemExit) as error:  # a tracker may raise anything, and ends nobody's run
                wait = min(RETRY_SECONDS * 2**self._failures, MOST_RETRY_SECONDS)
                self._tell(error, last)
            if last:
                return
            self._over.wait(wait)

    def _hand_over(self) -> None:
        if self._tail is None:
            received, words = self.consumer.start()
            tail = EventTail(self.run_dir)
            history = tail.new()
            alive = {id(event) for event in surviving(history)}
            numbered = enumerate(history, start=1)
            self._unsent = [(n, event) for n, event in numbered if n > received and id(event) in alive]
            self._read, self._tail = len(history), tail
            self.say(f"{self.consumer.name}: {words}")

        if not self._unsent:
            new = self._tail.new()
            self._unsent = list(enumerate(new, start=self._read + 1))
            self._read += len(new)
        if not self._unsent:
            self.consumer.idle()
        while self._unsent:
            chunk = self._unsent[:CHUNK]
            self.consumer.take([event for _, event in chunk], chunk[-1][0])
            self._unsent = self._unsent[CHUNK:]

    def _tell(self, error: BaseException, last: bool) -> None:
        self._failures += 1
        if last or self._failures == 1:
            words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            ending = self.consumer.remedy if last else "the run goes on, and this is tried again"
            self.say(f"{self.consumer.name} failed: {words}; {ending}")


@contextmanager
def fed(run_dir: str, consumers: Sequence[Consumer], say: Say, patience: float) -> Iterator[Sequence[Feed]]:
    """A block during which the consumers follow the run. Its end waits `patience` seconds for them, and no longer."""
    feeds = [Feed(run_dir, consumer, say) for consumer in consumers]
    for feed in feeds:
        feed.start()
    status = ""
    try:
        yield feeds
    except BaseException as error:
        status = "failed" if isinstance(error, Exception) else "stopped"
        raise
    finally:
        if feeds:
            _close(feeds, status or _how_it_ended(run_dir), patience)


def _close(feeds: Sequence[Feed], status: str, patience: float) -> None:
    for feed in feeds:
        feed.close(status)
    deadline = time.monotonic() + patience
    for feed in feeds:
        feed.join(max(0.0, deadline - time.monotonic()))
        if feed.is_alive():
            feed.say(f"{feed.consumer.name} does not answer, and the run does not wait for it; {feed.consumer.remedy}")


def _how_it_ended(run_dir: str) -> str:
    return next((e["status"] for e in reversed(read_events(run_dir)) if e["event"] == "end"), "stopped")
