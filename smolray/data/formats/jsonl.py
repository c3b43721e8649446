"""JSON lines and JSON lists -> raw rows, cut at line or element boundaries."""

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from smolray.data.formats.compression import is_compressed, open_content
from smolray.data.formats.damage import check_text, damaged, rows_joined
from smolray.data.formats.source import SCAN_BYTES, Format, Raw, ReadTask, SourceError

MAX_LINE = 64 * 2**20  # bytes of one record
MAX_VALUES = 2_000_000  # in one record: as Python objects they take a hundred times their bytes
LIST = "list"  # the variant of a ReadTask whose file is one JSON list
_GAP = re.compile(r"[ \t\r\n,]*")
_OPENING = re.compile(r"[ \t\r\n,\ufeff]*\[?[ \t\r\n,]*")


def cut_json(whole: ReadTask, size: int, task_bytes: int) -> Iterator[ReadTask]:
    """Byte ranges of about `task_bytes / 16` (images come on top) that end where a record ends.

    The file is read once from end to end to number the rows. A compressed file is one range of its content. Raises
    SourceError where the file is damaged or ends in the middle of a record.
    """
    limit = 2**63 if is_compressed(whole.uri) else max(task_bytes // 16, 1)
    with open_content(whole.uri) as file:
        head = file.read(SCAN_BYTES).lstrip(b"\xef\xbb\xbf \t\r\n")

    if head[:1] == b"[":
        yield from _cut_list(replace(whole, variant=LIST), limit)
        return

    start, first_row, row, place, tail = 0, 0, 0, 0, b""
    with open_content(whole.uri) as file:
        while chunk := file.read(SCAN_BYTES):
            begin = 0
            while (end := chunk.find(b"\n", begin)) >= 0:
                row, begin, tail = row + 1, end + 1, b""
                if place + begin - start >= limit:
                    yield replace(whole, start=start, stop=place + begin, first_row=first_row)
                    start, first_row = place + begin, row
            place += len(chunk)
            tail += chunk[begin:] if len(tail) <= MAX_LINE else b""

    _check_last_line(whole.uri, row, tail, place)
    if place > start:
        yield replace(whole, start=start, stop=place, first_row=first_row)


def _check_last_line(uri: str, row: int, line: bytes, stop: int) -> None:
    """Raise SourceError where the last line, which has no line end, is the beginning of a record."""
    text = line.decode("utf-8-sig", "replace").strip()
    if not text.startswith("{") or len(line) > MAX_LINE:
        return
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        # An open string is reported at its start, all else that is missing at the end.
        if error.pos >= len(text.rstrip()) - 1 or error.msg.startswith("Unterminated string"):
            fault = f"it ends in the middle of row {row}, at byte {stop}"
            raise damaged(uri, fault, "this row and what was to follow it are lost") from error
    except (ValueError, RecursionError):  # a whole line, and a bad one
        pass


def parse_json(text: bytes) -> Any:
    """The value of a JSON text in UTF-8. Raises ValueError, RecursionError, and UnicodeDecodeError."""
    if len(text) > MAX_VALUES and sum(map(text.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES} values in one row")
    return json.loads(text.decode("utf-8-sig"))


def read_json(task: ReadTask) -> Iterator[Raw]:
    """The rows of a task, from a JSON list or from JSON lines, whichever `cut_json` has found."""
    return _read_list(task) if task.variant == LIST else _read_lines(task)


def _read_lines(task: ReadTask) -> Iterator[Raw]:
    """One record for each line, numbered from 0. Blank lines are skipped, but count."""
    row, place = task.first_row, task.start
    with open_content(task.uri) as file:
        file.seek(task.start)
        while place < task.stop:
            start, line = place, file.readline(min(MAX_LINE, task.stop - place))
            if not line:
                raise damaged(task.uri, f"it ends at byte {place}", "what was behind it is lost")

            place += len(line)
            whole = line.endswith(b"\n") or place >= task.stop
            while not line.endswith(b"\n") and place < task.stop and (more := file.readline(MAX_LINE)):
                line = more
                place += len(line)

            if not whole:
                yield Raw(row, {}, reason="text_too_long", message=f"the line is longer than {MAX_LINE} bytes")
            elif line.strip(b" \t\r\n\xef\xbb\xbf"):
                check_text(task.uri, start, row, line)
                yield from _json_rows(row, line)
            row += 1


def _json_rows(row: int, line: bytes) -> Iterator[Raw]:
    """The record of a line. A line that holds none is a bad row, or several where line ends are lost."""
    try:
        record = parse_json(line)
    except UnicodeDecodeError as error:
        message = f"the line is not UTF-8: {error.reason} at byte {error.start} of the line"
        for _ in range(rows_joined(line, _is_record)):
            yield Raw(row, {}, reason="bad_text", message=message)
        return
    except (ValueError, RecursionError) as error:
        joined = rows_joined(line, _is_record)
        message = f"{error}; the line begins {line[:60]!r}" + (f"; it holds {joined} rows" if joined > 1 else "")
        for _ in range(joined):
            yield Raw(row, {}, reason="invalid_json", message=message)
        return

    if isinstance(record, dict):
        yield Raw(row, record)
    else:
        found = f"the line holds a {type(record).__name__}; expected an object"
        yield Raw(row, {}, reason="wrong_type", message=found)


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except (ValueError, RecursionError):
        return False


def _cut_list(whole: ReadTask, limit: int) -> Iterator[ReadTask]:
    start = stop = first_row = rows = 0
    for stop, _ in _elements(whole):
        rows += 1
        if stop - start >= limit:
            yield replace(whole, start=start, stop=stop, first_row=first_row)
            start, first_row = stop, rows

    if rows > first_row:
        yield replace(whole, start=start, stop=stop, first_row=first_row)


def _read_list(task: ReadTask) -> Iterator[Raw]:
    """The elements of the task's part of a JSON list, numbered over the whole file."""
    for number, (_, value) in enumerate(_elements(task)):
        if isinstance(value, dict):
            yield Raw(task.first_row + number, value)
        else:
            yield Raw(
                task.first_row + number,
                {},
                reason="wrong_type",
                message=f"a {type(value).__name__}; expected an object",
            )


def _elements(task: ReadTask) -> Iterator[tuple[int, Any]]:
    """(byte behind it, value) of each element of a JSON list, or of its bytes `start` to `stop`.

    Raises SourceError where the list is cut off or malformed.
    """
    decoder, text, at, place, ended = json.JSONDecoder(), "", 0, task.start, False
    # Bytes that are not UTF-8 become surrogates, so that only their rows are refused.
    utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    with open_content(task.uri) as file:
        file.seek(task.start)
        while True:
            gap = _GAP.match(text, at, len(text)) if place > task.start else _OPENING.match(text, at, len(text))
            behind = gap.end() if gap else at
            place, at = place + len(text[at:behind].encode(errors="surrogateescape")), behind

            fault = "it ends without a closing ]"
            if text[at : at + 1] == "]":
                if text[at + 1 :].strip() or file.read(SCAN_BYTES).strip():
                    raise SourceError(
                        f"{task.uri}: there is more after the end of the JSON list at byte {place}; expected one "
                        "list, or JSON lines"
                    )
                return

            # A number at the end of the text may continue in the next chunk.
            if at < len(text) and (ended or text[at] in '{["'):
                try:
                    value, behind = decoder.raw_decode(text, at)
                    place, at = place + len(text[at:behind].encode(errors="surrogateescape")), behind
                    yield place, value
                    continue
                except (ValueError, RecursionError) as error:
                    fault = str(error)
            if ended and at == len(text) and task.stop:  # the end of a task inside the list
                return

            if ended or len(text) - at > MAX_LINE:
                raise SourceError(
                    f"{task.uri} is not a whole JSON list: at byte {place} {fault}; download it again or repair it"
                )

            wanted = max(SCAN_BYTES, len(text) - at)
            chunk = file.read(min(wanted, task.stop - file.tell()) if task.stop else wanted)
            ended = not chunk
            text, at = text[at:] + utf8.decode(chunk, final=ended), 0


JSONL = Format(
    "jsonl",
    cut_json,
    read_json,
    suffixes=(".jsonl", ".ndjson", ".json"),
    metadata_suffixes=(".json",),
    compressible=True,
    names_images=True,
)
