"""Damaged files: how they are refused, and how damage inside a text is recognised.

A damaged container is refused as a whole. How many rows are lost behind the damage is not known, so no share of bad
rows could be judged.
"""

import re
from collections.abc import Callable

from smolray.data.formats.source import SourceError

# Control characters that no text file holds; with bytes that are not UTF-8 they are a sign of overwritten data.
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x19\x1c-\x1f]")
# What one flipped bit makes of a line end.
_FLIPPED_LINE_END = re.compile(rb"[\x0b\x08\x0e\x02\x1a*J\x8a]")
_LONGEST_JOINED = 2**20  # bytes of a line that is looked at for a lost line end


def damaged(uri: str, fault: str, lost: str) -> SourceError:
    """The error of a damaged file. `fault`: what was found and where; `lost`: what cannot be read for that."""
    return SourceError(f"{uri} is damaged: {fault}; {lost}. Download or write it again, or remove it from the source")


def check_text(uri: str, place: int, row: int, content: bytes) -> None:
    """Raise SourceError where a row of a text file, `content` at byte `place`, was overwritten with zeros or garbage.

    Text in another encoding than UTF-8 is not damage.
    """
    found = _CONTROL.search(content)
    if found is None:
        return
    zeros = b"\0" in content
    if not zeros and _is_utf8(content):
        return
    at = place + (content.index(b"\0") if zeros else found.start())
    what = "zero bytes" if zeros else "bytes that are no text"
    raise damaged(uri, f"{what} at byte {at}, in row {row}", "the rows that stood there are lost")


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def rows_joined(content: bytes, is_row: Callable[[bytes], bool]) -> int:
    """How many rows a line that is no row holds: 2 where one byte of it was a line end, else 1."""
    if len(content) <= _LONGEST_JOINED:
        for found in _FLIPPED_LINE_END.finditer(content):
            if is_row(content[: found.start()]) and is_row(content[found.end() :]):
                return 2
    return 1
