"""Imports without the packages that another package takes along and nothing here uses.

In: the name of such a package. Out: a block in which it counts as not installed.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without(package: str) -> Iterator[None]:
    """A block in which a package cannot be imported, unless it already is."""
    absent = package not in sys.modules
    if absent:
        sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if absent:
            del sys.modules[package]
