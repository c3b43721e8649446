"""WebDataset tars -> raw rows: the members of one key are one row."""

import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from smolray.data.formats.jsonl import parse_json
from smolray.data.formats.source import IMAGE_PARTS, Format, Raw, ReadTask, SourceError
from smolray.data.formats.tar import tar_members

MAX_MEMBERS = 1024  # of one key
MAX_ROW = 256 * 2**20  # bytes of the members of one key
MAX_TEXT_MEMBER = 64 * 2**20
TEXT_PARTS = ("txt", "json", "cls", "text", "caption", "cap")
COLUMN_OF = {"cap": "caption"}  # where the column has another name than the ending


@dataclass
class _Row:
    """The members of one key, as they come. Where they are too many or too large, none is kept."""

    key: str
    parts: dict[str, bytes] = field(default_factory=dict)
    endings: set[str] = field(default_factory=set)
    fault: str = ""
    members: int = 0
    links: int = 0
    size: int = 0

    def accepts(self, ending: str, member: tarfile.TarInfo) -> bool:
        """Whether the member's content is to be read; if not, the row has a fault or the member is a link."""
        self.members += 1
        self.size += member.size
        if not member.isfile():
            self.links += 1
            self.fault = self.fault or f"member {member.name!r} is a link; write it with tar --hard-dereference"
        elif ending in self.endings:
            self.fault = self.fault or f"two members of key {self.key!r} end in .{ending}"
        elif self.members > MAX_MEMBERS:
            self.fault = self.fault or f"key {self.key!r} has more than {MAX_MEMBERS} members"
        elif self.size > MAX_ROW:
            found = f"member {member.name!r} has {member.size} bytes; with it the row has {self.size}"
            self.fault = self.fault or f"{found}; the limit is {MAX_ROW}"
        elif ending in TEXT_PARTS and member.size > MAX_TEXT_MEMBER:
            found = f"member {member.name!r} has {member.size} bytes"
            self.fault = self.fault or f"{found}; the limit of a text is {MAX_TEXT_MEMBER}"

        if self.fault:
            self.parts = {}
        elif member.isfile():
            self.endings.add(ending)
        return not self.fault

    @property
    def name(self) -> str:
        return self.key.encode(errors="surrogateescape").decode(errors="replace")

    @property
    def is_there(self) -> bool:
        """Whether there is any member but links."""
        return self.members > self.links


def cut_tar(whole: ReadTask, size: int, task_bytes: int) -> Iterator[ReadTask]:
    """A tar can only be read from its beginning, so it is one task."""
    yield whole


def read_tar(task: ReadTask) -> Iterator[Raw]:
    """Stream the rows in the order of the archive, without writing to disk.

    The key of a member is its name up to the first dot. Raises SourceError where the archive is damaged, or where the
    members of a key do not follow each other.
    """
    number, row = 0, _Row("")
    endings_of: dict[int, frozenset[str]] = {}  # of each key, by its hash

    for member in tar_members(task.uri):
        info = member.info
        if info.isdir() or posixpath.basename(info.name).startswith("."):
            continue

        folder, base = posixpath.split(info.name)
        stem, _, ending = base.partition(".")
        if row.key != (key := posixpath.join(folder, stem)) or not row.members:
            if row.is_there:
                yield _finished(task.uri, row, number, endings_of)
                number += 1
            row = _Row(key)
        if row.accepts(ending.lower(), info):
            row.parts[ending.lower()] = member.read()

    if row.is_there:
        yield _finished(task.uri, row, number, endings_of)


def _finished(uri: str, row: _Row, number: int, endings_of: dict[int, frozenset[str]]) -> Raw:
    """The row. Raises SourceError where other members of its key came before."""
    endings = frozenset(row.endings)
    earlier = endings_of.setdefault(hash(row.key), endings)
    if earlier is not endings and not earlier & endings:
        found = f"the members of key {row.name!r} ({', '.join(sorted(earlier | endings))}) do not follow each other"
        raise SourceError(f"{uri}: {found}; expected all members of a key together: write it with tar --sort=name")
    return _to_raw(row, number)


def _to_raw(row: _Row, number: int) -> Raw:
    """The members of one key as a row.

    Its columns: the keys of `json`, texts by their ending, and `images` in archive order. Other members are columns by
    their ending.
    """
    if row.fault:
        return Raw(number, {}, row.name, "wrong_member", row.fault)

    record: dict[str, Any] = {}
    others = {e: c for e, c in row.parts.items() if e not in TEXT_PARTS and not _is_image(e)}
    dotted = [e for e in others if e.rpartition(".")[2] in TEXT_PARTS]
    if dotted and not any(e in TEXT_PARTS for e in row.parts):
        unused = ", ".join(f"{row.name}.{e}" for e in dotted[:3])
        found = f"the key ends at the first dot of the name ({row.name}), so {unused} cannot be used"
        return Raw(number, {}, row.name, "invalid_webdataset", f"{found}; write names without other dots")

    try:
        if "json" in row.parts:
            content = parse_json(row.parts["json"])
            if not isinstance(content, dict):
                found = f"{row.name}.json holds a {type(content).__name__}; expected an object"
                return Raw(number, {}, row.name, "wrong_type", found)
            record |= content
        for ending, part in row.parts.items():
            if ending in TEXT_PARTS and ending != "json":
                record[COLUMN_OF.get(ending, ending)] = part.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        return Raw(number, {}, row.name, "bad_text", f"a text part of {row.name} is not UTF-8: {error}")
    except (ValueError, RecursionError) as error:
        return Raw(number, {}, row.name, "invalid_json", f"{row.name}.json: {error}")

    # `0.jpg`, `1.png` and so on are several images of one key; the last part of the ending is the type.
    images = [content for ending, content in row.parts.items() if _is_image(ending)]
    if images:
        # The image itself replaces what the JSON says about it (a name, an original path).
        record = {name: value for name, value in record.items() if name not in ("image", "images", *IMAGE_PARTS)}
        record["images"] = images
    return Raw(number, {**others, **record}, row.name)


def _is_image(ending: str) -> bool:
    return ending.rpartition(".")[2] in IMAGE_PARTS


WEBDATASET = Format("webdataset", cut_tar, read_tar, suffixes=(".tar", ".tgz"), compressible=True)
