"""Classes of the user that follow a run: `callbacks: ["my_module:MyCallback"]`.

In: the path of a class without arguments. Out: an object with any of these methods; each gets an event of the run's log
as a dict (run/events.py says what is in it):

    on_start(event)       an attempt begins: config, total_steps, workers
    on_step(event)        an optimizer step: step, loss, learning_rate, …
    on_evaluate(event)    an evaluation: step, accuracy, metrics
    on_checkpoint(event)  a saved checkpoint: step, path
    on_end(event)         the end: status (finished, stopped or failed)

They are called in the driver, beside the run: one that raises or hangs does not stop it.
"""

import importlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from smolray.config import ConfigError
from smolray.run.events import Event, read_events

KINDS = ("start", "step", "evaluate", "checkpoint", "end")


def load_callback(path: str) -> Any:
    """The object of a class `module:Class`; the module may lie in the current folder.

    Raises ConfigError where there is no such class, it cannot be made, or it has none of the methods.
    """
    module, _, name = path.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        made = getattr(importlib.import_module(module), name)()
    except Exception as error:  # code of the user: it may raise anything
        raise ConfigError(
            f"callbacks names {path}, which cannot be made: {type(error).__name__}: {error}; expected module:Class, "
            "with the module in the current folder or installed, and a class without arguments"
        ) from error
    if not any(callable(getattr(made, f"on_{kind}", None)) for kind in KINDS):
        raise ConfigError(
            f"callbacks names {path}, which has none of the methods {', '.join(f'on_{kind}' for kind in KINDS)}"
        )
    return made


class CallbackConsumer:
    """Calls one object of the user for the events of this attempt. A call that raises is told, and not repeated."""

    remedy = "its last calls are left out"

    def __init__(self, path: str, run_dir: str, say: Callable[[str], None]):
        self.name, self.run_dir, self.say = path, run_dir, say
        self.called = load_callback(path)
        self.before = len(read_events(run_dir))
        self.ended = False
        self._told: set[str] = set()

    def start(self) -> tuple[int, str]:
        return self.before, "follows the run"

    def take(self, events: Sequence[Event], received: int) -> None:
        for event in events:
            self.ended = self.ended or event["event"] == "end"
            wanted = getattr(self.called, f"on_{event['event']}", None)
            if event["event"] in KINDS and wanted is not None:
                self._call(wanted, event)

    def idle(self) -> None:
        pass

    def end(self, status: str) -> None:
        if not self.ended:  # a run that fails in the driver writes its end later
            self.take([{"event": "end", "status": status, "time": time.time()}], 0)

    def _call(self, wanted: Callable[[Event], object], event: Event) -> None:
        try:
            wanted(event)
        except Exception as error:  # code of the user: it may raise anything
            if (kind := event["event"]) not in self._told:
                self._told.add(kind)
                self.say(f"{self.name}.on_{kind} raised {type(error).__name__}: {error}; the run goes on")
