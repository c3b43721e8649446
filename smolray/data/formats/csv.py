"""CSV and TSV files -> raw rows. The header line has the column names, every row is a record, images are paths.

Fields are quoted as in RFC 4180: a quoted field may hold delimiters, newlines and doubled quotes. Every value stays
text; an empty field is None.
"""

from collections.abc import Iterator
from dataclasses import replace
from enum import Enum
from io import BufferedReader

from smolray.data.formats.compression import is_compressed, open_content, without_compression
from smolray.data.formats.damage import check_text, damaged, rows_joined
from smolray.data.formats.source import Format, Raw, ReadTask, SourceError

MAX_ROW = 64 * 2**20  # bytes
_BOM = b"\xef\xbb\xbf"
_QUOTE_FAULT = "a quoted field is not closed, or text follows its closing quote"


class _State(Enum):
    """What a row is at the end of one of its lines."""

    WHOLE = 1
    OPEN = 2  # inside a quoted field
    BROKEN = 3  # text follows a closing quote


def cut_csv(whole: ReadTask, size: int, task_bytes: int) -> Iterator[ReadTask]:
    """Byte ranges of about `task_bytes / 16` (images come on top) that end where a row ends.

    The file is read once from end to end: only the quotes before a newline tell whether a row ends there. A compressed
    file is one range of its content. Raises SourceError where the file is damaged or ends in the middle of a row.
    """
    compressed = is_compressed(whole.uri)
    limit = 2**63 if compressed else max(task_bytes // 16, 1)
    names, start = _header(whole)
    first_row = row = 0
    stop, content, fault = start, b"", ""

    for stop, content, fault in _rows(replace(whole, start=start, stop=2**63 if compressed else size)):
        row += 1 if fault or not _is_blank(content) else 0
        if stop - start >= limit:
            yield replace(whole, start=start, stop=stop, first_row=first_row)
            start, first_row = stop, row

    open_end = not _is_blank(content) and not content.endswith((b"\n", b"\r")) and fault != "text_too_long"
    if open_end and (fault or len(_fields(content, _delimiter(whole.uri))) < len(names)):
        lost = "this row and what was to follow it are lost"
        raise damaged(whole.uri, f"it ends in the middle of row {row - 1}, at byte {stop}", lost)
    if row > first_row:
        yield replace(whole, start=start, stop=stop, first_row=first_row)


def read_csv(task: ReadTask) -> Iterator[Raw]:
    """The rows of a byte range, numbered from 0 after the header. Blank lines do not count."""
    names, _ = _header(task)
    number, delimiter = task.first_row, _delimiter(task.uri)

    for stop, content, fault in _rows(task):
        if not fault and _is_blank(content):
            continue
        check_text(task.uri, stop - len(content), number, content)
        if fault:
            raw = Raw(number, {}, reason=fault, message=_message(fault, content))
        else:
            raw = _parse(number, content, names, delimiter)
        yield raw
        # A line end that was damaged made one bad row of two.
        if raw.reason and rows_joined(content, lambda row: _is_row(row, names, delimiter)) > 1:
            yield raw
        number += 1


def _is_row(content: bytes, names: list[str], delimiter: bytes) -> bool:
    whole = _state(content, delimiter, inside=False) is _State.WHOLE
    return whole and len(_fields(content, delimiter)) == len(names)


def _parse(number: int, content: bytes, names: list[str], delimiter: bytes) -> Raw:
    fields = _fields(content, delimiter)
    if len(fields) != len(names):
        found = f"the row has {len(fields)} fields, the header has {len(names)}; the row begins {content[:60]!r}"
        return Raw(number, {}, reason="invalid_csv", message=found)
    try:
        values = [field.decode() for field in fields]
    except UnicodeDecodeError as error:
        return Raw(number, {}, reason="bad_text", message=f"the row is not UTF-8: {error}")
    return Raw(number, {name: value or None for name, value in zip(names, values, strict=True) if name})


def _message(fault: str, content: bytes) -> str:
    if fault == "text_too_long":
        return f"the line is longer than {MAX_ROW} bytes; it begins {content[:60]!r}"
    return f"{_QUOTE_FAULT}; the line begins {content[:60]!r}"


def _header(task: ReadTask) -> tuple[list[str], int]:
    """The column names and the byte where the first row begins. Raises SourceError for a header that cannot be used."""
    with open_content(task.uri) as file:
        skipped = len(_BOM) if file.peek(len(_BOM)).startswith(_BOM) else 0

    rows = _rows(replace(task, start=skipped, stop=2**63))
    stop, content, fault = next((r for r in rows if r[2] or not _is_blank(r[1])), (skipped, b"", ""))
    if fault:
        raise SourceError(f"{task.uri}: the header cannot be read: {_message(fault, content)}")
    try:
        names = [field.decode().strip() for field in _fields(content, _delimiter(task.uri))]
    except UnicodeDecodeError as error:
        raise SourceError(f"{task.uri}: the header is not UTF-8 ({error}); save the file as UTF-8") from error

    if b'"' not in content and b"\r" in content.rstrip(b"\r\n"):
        raise SourceError(f"{task.uri}: lines end in CR alone; expected LF or CR LF: save the file with such line ends")
    if repeated := sorted({name for name in names if name and names.count(name) > 1}):
        raise SourceError(f"{task.uri}: the header names {', '.join(repeated)} more than once; rename one of each")
    return names, stop


def _rows(task: ReadTask) -> Iterator[tuple[int, bytes, str]]:
    """(byte behind it, content, fault) of each row of the task's bytes, blank lines included.

    Where the quotes of a row do not match, its first line is a faulty row and the next line begins another row. So a
    stray quote costs one row, not all rows after it.
    """
    delimiter, place = _delimiter(task.uri), task.start
    with open_content(task.uri) as file:
        file.seek(place)
        while place < task.stop and (line := file.readline(MAX_ROW)):
            if len(line) == MAX_ROW and not line.endswith(b"\n"):
                place += len(line) + _skip_line(file)
                yield place, line, "text_too_long"
                continue

            content, state = _continued(file, line, place, task.stop, delimiter)
            place += len(content)
            yield place, content, "" if state is _State.WHOLE else "invalid_csv"


def _continued(file: BufferedReader, line: bytes, place: int, stop: int, delimiter: bytes) -> tuple[bytes, _State]:
    """The row that begins with `line`: with more lines where a quoted field spans several, else `line` alone."""
    state, lines, size = _state(line, delimiter, inside=False), [line], len(line)
    while state is _State.OPEN and size < MAX_ROW and place + size < stop and (more := file.readline(MAX_ROW)):
        state = _state(more, delimiter, inside=True)
        lines.append(more)
        size += len(more)

    if state is _State.WHOLE:
        return b"".join(lines), state
    if len(lines) > 1:
        file.seek(place + len(line))
    return line, state


def _state(line: bytes, delimiter: bytes, inside: bool) -> _State:
    """Follow the fields of one line; `inside`: it begins inside a quoted field."""
    if not inside and b'"' not in line:
        return _State.WHOLE
    at = 0
    while True:
        if inside or line.startswith(b'"', at):
            at = _closing_quote(line, at if inside else at + 1) + 1
            if at == 0:
                return _State.OPEN
            if not line.startswith(delimiter, at) and line[at:].strip(b"\r\n"):
                return _State.BROKEN
            inside = False

        at = line.find(delimiter, at) + 1
        if at == 0:
            return _State.WHOLE


def _closing_quote(text: bytes, at: int) -> int:
    """The place of the quote that closes the field open at `at`; -1 where none does. Two quotes stand for one."""
    while (at := text.find(b'"', at)) >= 0 and text.startswith(b'"', at + 1):
        at += 2
    return at


def _fields(content: bytes, delimiter: bytes) -> list[bytes]:
    """The fields of a whole row, without their quotes."""
    content = content.removesuffix(b"\n").removesuffix(b"\r")
    if b'"' not in content:
        return content.split(delimiter)

    fields, at = [], 0
    while True:
        if content.startswith(b'"', at):
            end = _closing_quote(content, at + 1)
            fields.append(content[at + 1 : end].replace(b'""', b'"'))
            at = end + 1
        else:
            end = content.find(delimiter, at)
            end = len(content) if end < 0 else end
            fields.append(content[at:end])
            at = end
        if at >= len(content):
            return fields
        at += 1


def _skip_line(file: BufferedReader) -> int:
    """Read to the end of the line and return the number of bytes read."""
    skipped = 0
    while piece := file.readline(MAX_ROW):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def _is_blank(content: bytes) -> bool:
    return not content.strip(b" \r\n")


def _delimiter(uri: str) -> bytes:
    return b"\t" if without_compression(uri).endswith((".tsv", ".tab")) else b","


CSV = Format(
    "csv",
    cut_csv,
    read_csv,
    suffixes=(".csv", ".tsv"),
    metadata_suffixes=(".csv", ".tsv"),
    compressible=True,
    names_images=True,
)
