"""A file that is one JSON object with lists in it, such as COCO's annotations, as a stream of the lists' elements.

In: the URI of a file. Out: (key, element) for each element of each list, and (key, value) for other values. Memory
holds one element.
"""

import json
import re
from collections.abc import Iterator
from io import TextIOWrapper
from typing import Any

from smolray.data.formats.compression import open_content
from smolray.data.formats.damage import damaged
from smolray.data.formats.source import SCAN_BYTES

LONGEST = 64 * 2**20  # characters of one element
_BLANK = re.compile(r"[ \t\r\n]*")


def object_items(uri: str) -> Iterator[tuple[str, Any]]:
    """Raises SourceError where the file is no whole JSON object."""
    with open_content(uri) as file:
        text = _Text(uri, TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape"))
        text.expect("{")
        while text.peek() != "}":
            key = text.value()
            text.expect(":")
            if text.peek() == "[":
                text.expect("[")
                while text.peek() != "]":
                    yield key, text.value()
                    if text.peek() != "]":
                        text.expect(",")
                text.expect("]")
            else:
                yield key, text.value()
            if text.peek() != "}":
                text.expect(",")
        text.expect("}")
        if text.peek():
            raise text.fault("there is more behind the object")


class _Text:
    """The text of a file, read as far as it is needed."""

    def __init__(self, uri: str, file: TextIOWrapper):
        self.uri, self.file = uri, file
        self.text, self.at, self.place = "", 0, 0
        self.decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is not blank; empty at the end."""
        while True:
            self.at = _blank_end(self.text, self.at)
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def expect(self, mark: str) -> None:
        if self.peek() != mark:
            raise self.fault(f"expected {mark!r}")
        self.at += 1

    def value(self) -> Any:
        """The next JSON value."""
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
                if end < len(self.text):  # a number at the end may continue
                    self.at = end
                    return value
                error: Exception | str = "it ends here"
            except (ValueError, RecursionError) as fault:
                error = fault
            if len(self.text) - self.at > LONGEST or not self._more():
                raise self.fault(str(error))

    def _more(self) -> bool:
        """Read on, twice as much as is left. Whether there was more."""
        chunk = self.file.read(max(SCAN_BYTES, len(self.text) - self.at))
        self.place += self.at
        self.text, self.at = self.text[self.at :] + chunk, 0
        return bool(chunk)

    def fault(self, what: str) -> Exception:
        return damaged(self.uri, f"at character {self.place + self.at}: {what}", "what is behind it is lost")


def _blank_end(text: str, at: int) -> int:
    match = _BLANK.match(text, at)
    return match.end() if match else at
