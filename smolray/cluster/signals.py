"""Ctrl-C and SIGTERM: the first asks a command to save and stop, the second ends it at once.

In: signals of the main thread. Out: Stopped, raised where the command is; or, while `patient`, a number that its loop
looks at. The exit codes are 130 and 143, as the shell's own.
"""

import atexit
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

T = TypeVar("T")
HANDLED = (signal.SIGINT, signal.SIGTERM)
LOOK_SECONDS = 0.05  # between two looks at a thread
LAST_WORDS_SECONDS = 3.0  # for the end that is written after the second signal


class Stopped(KeyboardInterrupt):
    """The command was asked to stop, and has stopped. `code`: its exit code; 0 where `smolray stop` asked."""

    def __init__(self, message: str = "", code: int = 0) -> None:
        super().__init__(message)
        self.code = code


def _nothing() -> None:
    """No last words."""


class StopSignals:
    """The signals of this process.

    Attributes:
        number: The first signal; 0 before.
        patient: A loop looks at `number`: nothing is raised.
        notice: What the first signal prints.
        last_words: Called when the second signal ends the process.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """As if no signal had come."""
        self.number = 0
        self.patient = False
        self.notice = b""
        self.last_words: Callable[[], None] = _nothing
        self.installed = False
        self._pending: BaseException | None = None

    @property
    def code(self) -> int:
        """The exit code of a process that was asked to stop by a signal, else 0."""
        return 128 + self.number if self.number else 0

    def handle(self, number: int, frame: Any) -> None:
        """The handler of both signals."""
        if self._pending is not None:
            error, self._pending = self._pending, None
            raise error
        if self.number:
            self._end_at_once(number)
        self.number = number
        # not print: the interrupted code may be inside it
        os.write(2, self.notice)
        if not self.patient:
            raise Stopped("", self.code)

    def interrupt(self, error: BaseException) -> None:
        """Raise an error in the main thread, wherever that is; from another thread."""
        if self.installed:
            self._pending = error
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def _end_at_once(self, number: int) -> None:
        words = threading.Thread(target=self.last_words, daemon=True)
        words.start()
        words.join(LAST_WORDS_SECONDS)
        os.write(2, b"ended at once\n")
        os._exit(128 + number)


SIGNALS = StopSignals()


def _keep_exit_code() -> None:
    """Ignore signals from here on: this process has ended.

    Python gives signals back to the system before its last steps. One more would end the process, and its exit code
    would be the signal's.
    """
    if SIGNALS.number and SIGNALS.installed:
        for number in HANDLED:
            signal.signal(number, signal.SIG_IGN)


atexit.register(_keep_exit_code)  # registered first, called last


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """A block in which the first signal stops politely.

    Only the main thread receives signals; elsewhere, and inside another such block, nothing changes.
    """
    if SIGNALS.installed or threading.current_thread() is not threading.main_thread():
        yield SIGNALS if threading.current_thread() is threading.main_thread() else StopSignals()
        return
    former = {number: signal.getsignal(number) for number in HANDLED}
    for number in HANDLED:
        signal.signal(number, SIGNALS.handle)
    SIGNALS.installed = True
    try:
        yield SIGNALS
    finally:
        if SIGNALS.number:
            SIGNALS.last_words = _nothing  # the process ends, and one more signal still ends it at once
        else:
            SIGNALS.reset()
            for number, handler in former.items():
                with suppress(TypeError):  # one that was not installed from Python
                    signal.signal(number, handler)


def in_thread(work: Callable[[], T]) -> T:
    """Do `work` in a thread and wait for it; raises what it raises. The main thread keeps its handlers of signals.

    In the main thread Ray takes signals for itself, and a handler of ours would wait for it. Its C++ code takes SIGTERM
    in any thread, and would end a run in a dump of stacks before it has saved: the handlers are set again until it has.
    """
    in_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in HANDLED} if in_main else {}
    results, errors = list[T](), list[BaseException]()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(LOOK_SECONDS)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if errors:
        raise errors[0]
    return results[0]
