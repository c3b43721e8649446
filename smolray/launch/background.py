"""Work in the background of a block.

In: a function. Out: a context manager, in which the function runs until the block ends.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
