"""Messages about a run, to mail, Slack, Telegram, ntfy and the other services of Apprise: `notify: [ntfy://$TOPIC]`.

In: the events of a run's log. Out: a message when the run has finished or failed, when its workers were lost, and when
it writes nothing any more. The driver sends them; what keeps a run alive (cluster/resubmit.py) tells of a lost driver.
"""

import os
import re
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from smolray.config import ConfigError, RunConfig
from smolray.run.events import Event, read_events
from smolray.run.status import state_of
from smolray.tracking.feed import Say, fed

VARIABLE = re.compile(r"\$\{?(\w+)\}?")
REMEMBERED = 60  # newest events, from which the usual pause between two is known
END_SECONDS = 20.0  # that the end of a run waits for its last message, at most


def check_notify(config: RunConfig) -> None:
    """Raise ConfigError where Apprise is not installed or an address of `notify` cannot be used."""
    if config.notify:
        apprise_of(config)


def apprise_of(config: RunConfig) -> Any:
    """Apprise with the addresses of the run; `$NAME` in them is taken from the environment.

    Raises ConfigError where the package or a variable is missing, or an address is not one that Apprise knows.
    """
    if find_spec("apprise") is None:
        raise ConfigError("notify needs Apprise, which is not installed; run: pip install 'smolray[notify]'")
    import apprise

    found = apprise.Apprise()
    for address in config.notify:
        if urlsplit(address).password and not VARIABLE.search(urlsplit(address).password or ""):
            raise ConfigError(
                f"notify holds the password of a {urlsplit(address).scheme} address, and settings are stored with the "
                "run; write $NAME in its place, and set NAME in the environment"
            )
        for name in VARIABLE.findall(address):
            if name not in os.environ:
                raise ConfigError(f"notify names ${name}, which is not set in the environment of the driver")
        if not found.add(VARIABLE.sub(lambda match: os.environ[match[1]], address)):
            raise ConfigError(
                f"notify = {address!r} is no address that Apprise knows; expected such as ntfy://$TOPIC or "
                "mailto://$USER:$PASSWORD@example.org (https://github.com/caronc/apprise/wiki)"
            )
    return found


def send(config: RunConfig, what: str, body: str) -> str:
    """Send `<run> <what>` to the addresses of the run. Returns a line that says why it was not sent; empty: it was."""
    if not config.notify:
        return ""
    try:
        if apprise_of(config).notify(title=f"{config.name} {what}", body=body or what):
            return ""
        why = "a service did not take it"
    except Exception as error:  # a service's code may raise anything, and ends nobody's run
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return f"notify: the message that {config.name} {what} was not sent: {why}"


class NotifyConsumer:
    """Sends messages about the events of this session."""

    name, remedy = "notify", "its last message is left out"

    def __init__(self, config: RunConfig, say: Say):
        self.config, self.say = config, say
        self.before = len(read_events(config.run_dir))
        self.newest: deque[Event] = deque(maxlen=REMEMBERED)
        self.started = self.stalled = self.ended = False

    def start(self) -> tuple[int, str]:
        return self.before, f"sends to {len(self.config.notify)} address{'es' * (len(self.config.notify) != 1)}"

    def take(self, events: Sequence[Event], received: int) -> None:
        self.newest.extend(events)
        self.stalled = False
        for event in events:
            if event["event"] == "resume" and self.started:
                self._send("lost workers", f"It goes on from step {event.get('step', 0):,}.")
            elif event["event"] == "end" and event["status"] in ("finished", "failed"):
                self._ended(event)
            self.started = self.started or event["event"] == "start"
            self.ended = event["event"] == "end"

    def idle(self) -> None:
        state, quiet = state_of(list(self.newest), time.time())
        if state == "stalled" and not self.stalled:
            self.stalled = True
            self._send("has stalled", f"Nothing was written for {quiet:.0f} s. See: smolray status {self.config.name}")

    def end(self, status: str) -> None:
        if not self.ended and status == "failed":  # in the driver, before the log says so
            self._send("failed", "The log of its driver says why.")

    def _ended(self, event: Event) -> None:
        steps = f"step {event['step']:,}" if event.get("step") else ""
        self._send(event["status"], event.get("error") or steps)

    def _send(self, what: str, body: str) -> None:
        if unsent := send(self.config, what, body):
            self.say(unsent)


@contextmanager
def notified(config: RunConfig, say: Say) -> Iterator[None]:
    """A block during which messages are sent about what the run writes; its end waits for the last one."""
    consumers = [NotifyConsumer(config, say)] if config.notify else []
    with fed(config.run_dir, consumers, say, END_SECONDS):
        yield
