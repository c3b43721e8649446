"""A file of lines that grows while a run trains, on local storage or elsewhere.

In: lines of text. Out: one file; what is written once is never lost.
"""

from collections.abc import Iterable
from pathlib import Path

from smolray import storage


class LineFile:
    """Adds lines to a file. Local storage appends; other storage has no append, so the whole file is written again.

    `written`: the lines that the file holds already.
    """

    def __init__(self, uri: str, written: Iterable[str] = ()):
        self.uri = uri
        self.lines = list(written)
        self._flushed = len(self.lines)
        self._torn = _is_torn(uri)

    def add(self, line: str) -> None:
        """Keep a line for the next flush."""
        self.lines.append(line)

    def flush(self) -> None:
        """Write what has not been written. Raises StorageFullError, and then keeps the lines for the next flush."""
        if self._flushed == len(self.lines):
            return

        if storage.is_local(self.uri):
            # A process that died in the middle of a line left it without its end.
            start = "\n" if self._torn else ""
            storage.append_text(self.uri, start + _text(self.lines[self._flushed :]))
        else:
            storage.write_bytes(self.uri, _text(self.lines).encode())
        self._torn = False
        self._flushed = len(self.lines)


def _text(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _is_torn(uri: str) -> bool:
    path = Path(storage.absolute(uri))
    return storage.is_local(uri) and path.exists() and not path.read_bytes().endswith(b"\n")
