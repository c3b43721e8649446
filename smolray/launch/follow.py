"""Who sees what a run writes into its log while it trains: the terminal, its trackers and its callbacks.

In: a run. Out: lines of progress; what the trackers show (smolray/tracking). The workers' own output stays in Ray's
logs.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from smolray import storage
from smolray.config import RunConfig
from smolray.data.reader import Folders
from smolray.launch.background import in_background
from smolray.launch.result import report_images
from smolray.run.events import EventTail
from smolray.run.progress import event_line
from smolray.tracking.feed import fed
from smolray.tracking.registry import consumers_of

END_SECONDS = 60.0  # that the end of a run waits for its trackers, at most


@contextmanager
def followed(config: RunConfig, folders: Folders) -> Iterator[None]:
    """A block during which the run's events are printed, and its trackers and callbacks follow them."""
    consumers = list(consumers_of(config, partial(report_images, config, folders), _say))
    with fed(config.run_dir, consumers, _say, END_SECONDS), _shown(config):
        yield


@contextmanager
def _shown(config: RunConfig) -> Iterator[None]:
    run_dir, tail = config.run_dir, EventTail(config.run_dir, skip=True)

    def follow(over: threading.Event) -> None:
        total = None
        while True:
            last = over.is_set()
            for event in tail.new():
                total = event.get("total_steps", total)
                if event["event"] != "step" or _is_shown(event["step"], config):
                    print(event_line(event, total), flush=True)
            if last:
                return
            over.wait(1.0 if storage.is_local(run_dir) else 5.0)

    with in_background(follow):
        yield


def _is_shown(step: int, config: RunConfig) -> bool:
    return step % config.train.logging_steps == 0 or (step == 1 and config.train.logging_first_step)


def _say(line: str) -> None:
    print(f"tracker {line}", flush=True)
