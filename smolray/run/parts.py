"""A file of lines that grows while a run trains, on object storage, which has no append: a folder of numbered parts.

In: lines of text. Out: files `<stream>-<first>-<last>-<writer>.jsonl`, each with the lines of these numbers. No file is
ever written again, and no two writers write one file, so none can damage what another has written. From time to time a
writer merges its own parts into a segment, a file of the same kind, and deletes them.

Lines of one stream are in the order of their numbers; streams are in the order of their names.
"""

import re
import uuid
from contextlib import suppress
from dataclasses import dataclass

from smolray import storage
from smolray.run.lines import LineFile, text_of

MIN_PARTS = 16  # fewer are not worth a segment
MAX_PARTS = 256  # as many as a reader has to open when checkpoints are seldom
NAME = re.compile(r"(?P<stream>.+)-(?P<first>\d{9})-(?P<last>\d{9})-(?P<writer>[0-9a-f]{8})\.jsonl")
RETRIES = 10  # readings of a folder whose parts are being merged


@dataclass(frozen=True, order=True)
class Part:
    """A file with the lines `first` to `last` of a writer."""

    stream: str
    first: int
    last: int
    writer: str

    @property
    def name(self) -> str:
        """Its name in the folder."""
        return f"{self.stream}-{self.first:09d}-{self.last:09d}-{self.writer}.jsonl"


class LineParts:
    """Adds lines to a folder of parts. `first`: the number of its first line."""

    def __init__(self, folder: str, stream: str, first: int = 1):
        self.folder, self.stream, self.writer = folder, stream, uuid.uuid4().hex[:8]
        self._parts: list[Part] = []  # since the newest segment
        self._merged: list[str] = []  # the lines of these parts
        self._lines: list[str] = []  # in no part yet
        self._next = first

    def add(self, line: str) -> None:
        """Keep a line for the next flush."""
        self._lines.append(line)

    def flush(self) -> None:
        """Write what has not been written. The lines are kept for the next flush where that fails."""
        if not self._lines:
            return
        part = Part(self.stream, self._next, self._next + len(self._lines) - 1, self.writer)
        self._write(part, self._lines)
        self._parts.append(part)
        self._merged += self._lines
        self._lines, self._next = [], part.last + 1
        if len(self._parts) >= MAX_PARTS:
            self.merge()

    def merge(self) -> None:
        """Replace this writer's parts by one segment, where they are many."""
        if len(self._parts) < MIN_PARTS:
            return
        segment = Part(self.stream, self._parts[0].first, self._parts[-1].last, self.writer)
        self._write(segment, self._merged)
        with suppress(OSError):  # what stays is passed over by readers
            storage.delete_files(self.folder, [part.name for part in self._parts])
        self._parts, self._merged = [], []

    def _write(self, part: Part, lines: list[str]) -> None:
        storage.write_bytes(storage.join(self.folder, part.name), text_of(lines).encode())


def line_log(file: str, folder: str, stream: str, first: int = 1) -> LineFile | LineParts:
    """Adds lines to a local `file`, or to parts of `stream` in `folder` where storage has no append."""
    return LineFile(file) if storage.is_local(file) else LineParts(folder, stream, first)


def is_part(name: str) -> bool:
    """Whether a file of this name is a part."""
    return NAME.fullmatch(name) is not None


def list_parts(folder: str) -> list[Part]:
    """The parts in a folder in the order of their lines, without those that a segment holds too."""
    matches = (NAME.fullmatch(file.base_name) for file in storage.list_files(folder))
    found = [Part(m["stream"], int(m["first"]), int(m["last"]), m["writer"]) for m in matches if m]

    reached: dict[tuple[str, str], int] = {}
    parts = []
    for part in sorted(found, key=lambda p: (p.stream, p.first, -p.last, p.writer)):
        if part.last > reached.get((part.stream, part.writer), 0):
            reached[part.stream, part.writer] = part.last
            parts.append(part)
    return parts


class PartsReader:
    """Reads the lines of a folder of parts: all of them at first, then those that are new."""

    def __init__(self, folder: str):
        self.folder = folder
        self.last = 0  # the highest number of a line that was read
        self._seen: dict[tuple[str, str], int] = {}

    def new(self) -> list[tuple[str, bytes]]:
        """(stream, line) of what was added since the last call. Parts that were read already are not read again."""
        numbered = []
        for part, data in self._read_new():
            writer = (part.stream, part.writer)
            seen = self._seen.get(writer, 0)
            for number, line in enumerate(data.splitlines(), part.first):
                if number > seen:
                    numbered.append((part.stream, number, part.writer, line))
            self._seen[writer] = part.last
            self.last = max(self.last, part.last)
        return [(stream, line) for stream, _, _, line in sorted(numbered)]

    def _read_new(self) -> list[tuple[Part, bytes]]:
        for left in reversed(range(RETRIES)):
            parts = [p for p in list_parts(self.folder) if p.last > self._seen.get((p.stream, p.writer), 0)]
            try:
                return list(zip(parts, storage.read_files(self.folder, [p.name for p in parts]), strict=True))
            except FileNotFoundError:  # merged since they were listed
                if not left:
                    raise
        return []
