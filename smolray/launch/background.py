"""Work in threads: in the background of a block, or so that the main thread is free for signals.

In: a function. Out: a context manager, in which the function runs until the block ends; or its result.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def in_background(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """A block during which `work(over)` runs in a thread. Its end sets `over` and waits for `work` to return."""
    over = threading.Event()
    thread = threading.Thread(target=work, args=(over,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def in_thread(work: Callable[[], T]) -> T:
    """Do `work` in a thread and wait for it; raises what it raises. Ray Train takes Ctrl-C for itself in the main
    thread, and a handler of ours would wait for it.
    """
    results, errors = list[T](), list[BaseException]()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if errors:
        raise errors[0]
    return results[0]
