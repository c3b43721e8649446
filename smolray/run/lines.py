"""A file of lines that grows while a run trains, on local storage.

In: lines of text. Out: one file; what is written once is never lost. Object storage has no append: see run/parts.py.
"""

from pathlib import Path

from smolray import storage


class LineFile:
    """Adds lines to a local file."""

    def __init__(self, uri: str):
        self.uri = uri
        self._lines: list[str] = []
        self._torn = _is_torn(uri)

    def add(self, line: str) -> None:
        """Keep a line for the next flush."""
        self._lines.append(line)

    def flush(self) -> None:
        """Write what has not been written. Raises StorageFullError, and then keeps the lines for the next flush."""
        if not self._lines:
            return

        # A process that died in the middle of a line left it without its end.
        start = "\n" if self._torn else ""
        storage.append_text(self.uri, start + text_of(self._lines))
        self._lines, self._torn = [], False

    def merge(self) -> None:
        """A file has no parts."""


def text_of(lines: list[str]) -> str:
    """The lines as the text of a file."""
    return "".join(f"{line}\n" for line in lines)


def _is_torn(uri: str) -> bool:
    path = Path(storage.absolute(uri))
    return path.exists() and not path.read_bytes().endswith(b"\n")
