"""Files -> raw rows: Parquet, WebDataset tars, JSON lines and JSON lists, each read as a stream.

In: a Unit. Out: its `Raw` rows. A row that cannot be read is a Raw with a reason, and so is a file's torn end: nothing is skipped.
"""

import codecs
import io
import json
import posixpath
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from smolray import storage
from smolray.data.units import Raw, SourceError, Unit

MAX_LINE = 64 * 2**20  # bytes of one JSON record or of one member of a tar that is not an image
MAX_MEMBER = 256 * 2**20
BATCH_ROWS = 16
SCAN_BYTES = 2**20
TEXT_PARTS = ("txt", "json", "cls", "text", "caption")
_GAP = re.compile(r"[ \t\r\n,]*")
_OPENING = re.compile(r"[ \t\r\n,\ufeff]*\[?[ \t\r\n,]*")
IMAGE_PARTS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "jp2", "avif", "img")


def _open(uri: str) -> io.BufferedReader:
    fs, path = storage.filesystem(uri)
    return io.BufferedReader(fs.open_input_file(path), SCAN_BYTES)


# Parquet


def cut_parquet(whole: Unit, size: int, unit_bytes: int) -> Iterator[Unit]:
    """Runs of row groups of about `unit_bytes`. Raises SourceError where the footer cannot be read."""
    try:
        with _open(whole.uri) as file:
            footer = pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(
            f"{whole.uri} is not a readable Parquet file ({error}); download it again or take it out of the source"
        ) from error
    start, first_row, row, held = 0, 0, 0, 0
    for group in range(footer.num_row_groups):
        row += footer.row_group(group).num_rows
        held += sum(footer.row_group(group).column(c).total_compressed_size for c in range(footer.num_columns))
        if held >= unit_bytes or group == footer.num_row_groups - 1:
            yield replace(whole, reader="parquet", start=start, stop=group + 1, first_row=first_row)
            start, first_row, held = group + 1, row, 0


def read_parquet(unit: Unit) -> Iterator[Raw]:
    """Rows of the unit's row groups, numbered through the file; where pages are damaged every lost row is a Raw of its own."""
    row = unit.first_row
    with _open(unit.uri) as stream:
        # pre_buffer would hold whole row groups; without it pages come as they are needed.
        file = pq.ParquetFile(stream, buffer_size=SCAN_BYTES, pre_buffer=False)
        stop = row + sum(file.metadata.row_group(g).num_rows for g in range(unit.start, unit.stop))
        labels = _label_names(file.schema_arrow)
        try:
            for batch in file.iter_batches(batch_size=BATCH_ROWS, row_groups=range(unit.start, unit.stop), use_threads=False):
                for raw in _batch_rows(batch, row):
                    yield _with_labels(raw, labels)
                row += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            for lost in range(row, stop):
                yield Raw(lost, {}, reason="torn_file", message=f"{unit.uri} cannot be read from about row {row} on: {error}")


def _batch_rows(batch: pa.RecordBatch, first: int) -> Iterator[Raw]:
    try:
        for number, record in enumerate(batch.to_pylist()):
            yield Raw(first + number, record)
    except UnicodeDecodeError:  # one bad string spoils to_pylist for all of them
        for number in range(batch.num_rows):
            try:
                yield Raw(first + number, batch.slice(number, 1).to_pylist()[0])
            except UnicodeDecodeError as error:
                yield Raw(first + number, {}, reason="bad_text", message=f"a text column is not UTF-8: {error}")


def _label_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Names of the Hugging Face ClassLabel columns, which are stored as numbers."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: f["names"] for name, f in features.items() if isinstance(f, dict) and f.get("_type") == "ClassLabel"}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}  # metadata is a courtesy; without it labels stay numbers


def _with_labels(raw: Raw, labels: dict[str, list[str]]) -> Raw:
    named = {
        c: names[raw.record[c]] for c, names in labels.items() if isinstance(raw.record.get(c), int) and 0 <= raw.record[c] < len(names)
    }
    return replace(raw, record={**raw.record, **named}) if named else raw


# WebDataset


def cut_tar(whole: Unit, size: int, unit_bytes: int) -> Iterator[Unit]:
    """A tar can only be read from its beginning, so it is one unit."""
    yield replace(whole, reader="tar")


def read_tar(unit: Unit) -> Iterator[Raw]:
    """Members are streamed in order and never touch the disk; those of one key (the name up to the first dot) must be neighbours."""
    row, key, parts, faults = 0, None, dict[str, bytes](), list[str]()
    try:
        with _open(unit.uri) as stream, tarfile.open(fileobj=stream, mode="r|*", errors="surrogateescape") as tar:
            for member in tar:
                if not member.isfile() or posixpath.basename(member.name).startswith("."):
                    continue
                folder, base = posixpath.split(member.name)
                stem, _, suffix = base.partition(".")
                if (name := posixpath.join(folder, stem)) != key:
                    if key is not None:
                        yield _tar_row(row, key, parts, faults)
                        row += 1
                    key, parts, faults = name, {}, []
                if member.size > MAX_MEMBER:
                    faults.append(f"member {member.name!r} has {member.size} bytes; the limit is {MAX_MEMBER}")
                elif suffix.lower() in parts:
                    faults.append(f"two members of key {name!r} end in .{suffix}")
                else:
                    content = tar.extractfile(member)
                    parts[suffix.lower()] = content.read() if content else b""
                    if len(parts[suffix.lower()]) != member.size:
                        raise tarfile.ReadError(f"member {member.name!r} is cut short")
                tar.members = []  # type: ignore[attr-defined]  # the list of members would grow with the archive
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        found = f" (key {key!r})" if key is not None else ""
        message = f"{unit.uri} cannot be read beyond row {row}{found}: {error}; the rows behind it are lost: download it again"
        yield Raw(row, {}, reason="torn_file", message=message)
        return
    except Exception as error:  # decompressors raise errors of their own (zlib, lzma)
        yield Raw(row, {}, reason="torn_file", message=f"{unit.uri} cannot be read beyond row {row}: {error}")
        return
    if key is not None:
        yield _tar_row(row, key, parts, faults)


def _tar_row(row: int, key: str, parts: dict[str, bytes], faults: list[str]) -> Raw:
    """Parts of one key as columns: the keys of `json`, texts by their suffix, images as `images` in the order of the archive."""
    record: dict[str, Any] = {}
    name = key.encode(errors="surrogateescape").decode(errors="replace")
    if faults:
        return Raw(row, {}, name, "wrong_member", "; ".join(faults))
    try:
        if "json" in parts:
            content = json.loads(parts["json"])
            if not isinstance(content, dict):
                return Raw(row, {}, name, "wrong_type", f"{name}.json holds a {type(content).__name__}; expected an object")
            record |= content
        for suffix, content in parts.items():
            if suffix in TEXT_PARTS and suffix != "json":
                record[suffix] = content.decode()
    except UnicodeDecodeError as error:
        return Raw(row, {}, name, "bad_text", f"a text part of {name} is not UTF-8: {error}")
    except (ValueError, RecursionError) as error:
        return Raw(row, {}, name, "invalid_json", f"{name}.json: {error}")
    # `0.jpg`, `1.png` and so on are several images of one key; the last piece of the suffix says what it is.
    images = [content for suffix, content in parts.items() if suffix.rpartition(".")[2] in IMAGE_PARTS]
    if images:
        # What the JSON says about its image (a name, an original path) gives way to the image itself.
        record = {name: value for name, value in record.items() if name not in ("image", "images", *IMAGE_PARTS)} | {"images": images}
    return Raw(row, record, name)


# JSON


def cut_json(whole: Unit, size: int, unit_bytes: int) -> Iterator[Unit]:
    """Byte ranges of about `unit_bytes / 16` (images come on top) that end where a record ends, with the number of their first row."""
    limit = max(unit_bytes // 16, 1)
    with _open(whole.uri) as file:
        head = file.read(SCAN_BYTES).lstrip(b"\xef\xbb\xbf \t\r\n")
    if head[:1] == b"[":
        yield from _cut_list(replace(whole, reader="json"), limit)
        return
    start, first_row, row, place = 0, 0, 0, 0
    with _open(whole.uri) as file:
        while chunk := file.read(SCAN_BYTES):
            begin = 0
            while (end := chunk.find(b"\n", begin)) >= 0:
                row, begin = row + 1, end + 1
                if place + begin - start >= limit:
                    yield replace(whole, reader="jsonl", start=start, stop=place + begin, first_row=first_row)
                    start, first_row = place + begin, row
            place += len(chunk)
    if place > start:
        yield replace(whole, reader="jsonl", start=start, stop=place, first_row=first_row)


def read_jsonl(unit: Unit) -> Iterator[Raw]:
    """One record a line, numbered from 0; blank lines are no rows."""
    row, place = unit.first_row, unit.start
    with _open(unit.uri) as file:
        file.seek(unit.start)
        while place < unit.stop:
            line = file.readline(min(MAX_LINE, unit.stop - place))
            if not line:
                break
            place += len(line)
            whole = line.endswith(b"\n") or place >= unit.stop
            while not line.endswith(b"\n") and place < unit.stop:
                line = file.readline(min(MAX_LINE, unit.stop - place))
                place += len(line)
            if not whole:
                yield Raw(row, {}, reason="text_too_long", message=f"the line is longer than {MAX_LINE} bytes")
            elif line.strip(b" \t\r\n\xef\xbb\xbf"):
                yield _json_row(row, line)
            row += 1


def _json_row(row: int, line: bytes) -> Raw:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Raw(row, {}, reason="bad_text", message=f"the line is not UTF-8: {error}")
    except (ValueError, RecursionError) as error:
        return Raw(row, {}, reason="invalid_json", message=f"{error}; the line begins {line[:60]!r}")
    if not isinstance(record, dict):
        return Raw(row, {}, reason="wrong_type", message=f"the line holds a {type(record).__name__}; expected an object")
    return Raw(row, record)


def _cut_list(whole: Unit, limit: int) -> Iterator[Unit]:
    start = stop = first_row = rows = 0
    for stop, _ in _elements(whole):
        rows += 1
        if stop - start >= limit:
            yield replace(whole, start=start, stop=stop, first_row=first_row)
            start, first_row = stop, rows
    if rows > first_row:
        yield replace(whole, start=start, stop=stop, first_row=first_row)


def read_json(unit: Unit) -> Iterator[Raw]:
    """The elements of the unit's part of a JSON list, numbered through the file."""
    for number, (_, value) in enumerate(_elements(unit)):
        if isinstance(value, dict):
            yield Raw(unit.first_row + number, value)
        else:
            yield Raw(unit.first_row + number, {}, reason="wrong_type", message=f"a {type(value).__name__}; expected an object")


def _elements(unit: Unit) -> Iterator[tuple[int, Any]]:
    """(byte behind it, value) of each element of a JSON list, or of its bytes `start` to `stop`. Raises SourceError where it is torn."""
    decoder, text, at, place, ended = json.JSONDecoder(), "", 0, unit.start, False
    # Bytes that are no UTF-8 become surrogates, which the parser refuses row by row.
    utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    with _open(unit.uri) as file:
        file.seek(unit.start)
        while True:
            gap = _GAP.match(text, at, len(text)) if place > unit.start else _OPENING.match(text, at, len(text))
            behind = gap.end() if gap else at
            place, at = place + len(text[at:behind].encode(errors="surrogateescape")), behind
            fault = "it ends without a closing ]"
            if text[at : at + 1] == "]":
                if text[at + 1 :].strip() or file.read(SCAN_BYTES).strip():
                    raise SourceError(
                        f"{unit.uri}: more follows behind the end of the JSON list at byte {place}; expected one list, or JSON lines"
                    )
                return
            # A number at the end of the text may go on in the next chunk.
            if at < len(text) and (ended or text[at] in '{["'):
                try:
                    value, behind = decoder.raw_decode(text, at)
                    place, at = place + len(text[at:behind].encode(errors="surrogateescape")), behind
                    yield place, value
                    continue
                except (ValueError, RecursionError) as error:
                    fault = str(error)
            if ended and at == len(text) and unit.stop:  # the end of a unit inside the list
                return
            if ended or len(text) - at > MAX_LINE:
                raise SourceError(f"{unit.uri} is not a whole JSON list: at byte {place} {fault}; download it again or mend it")
            wanted = max(SCAN_BYTES, len(text) - at)
            chunk = file.read(min(wanted, unit.stop - file.tell()) if unit.stop else wanted)
            ended = not chunk
            text, at = text[at:] + utf8.decode(chunk, final=ended), 0


READERS: dict[str, Callable[[Unit], Iterator[Raw]]] = {"parquet": read_parquet, "tar": read_tar, "jsonl": read_jsonl, "json": read_json}
