"""WebDataset tars -> raw rows: the members of one key are one row."""

import json
import posixpath
import tarfile
from collections.abc import Iterator
from typing import Any

from smolray.data.formats.source import IMAGE_PARTS, Format, Raw, ReadTask, open_source

MAX_MEMBER = 256 * 2**20
TEXT_PARTS = ("txt", "json", "cls", "text", "caption")


def cut_tar(whole: ReadTask, size: int, task_bytes: int) -> Iterator[ReadTask]:
    """A tar can only be read from its beginning, so it is one task."""
    yield whole


def read_tar(task: ReadTask) -> Iterator[Raw]:
    """Stream the members in order, without writing to disk.

    Members of one key (the name up to the first dot) must follow each other.
    """
    row, key, parts, faults = 0, None, dict[str, bytes](), list[str]()
    try:
        with open_source(task.uri) as stream, tarfile.open(fileobj=stream, mode="r|*", errors="surrogateescape") as tar:
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
        message = (
            f"{task.uri} cannot be read beyond row {row}{found}: {error}; the rows after it are lost: download it again"
        )
        yield Raw(row, {}, reason="torn_file", message=message)
        return
    except Exception as error:  # decompressors have their own errors (zlib, lzma)
        yield Raw(row, {}, reason="torn_file", message=f"{task.uri} cannot be read beyond row {row}: {error}")
        return

    if key is not None:
        yield _tar_row(row, key, parts, faults)


def _tar_row(row: int, key: str, parts: dict[str, bytes], faults: list[str]) -> Raw:
    """The members of one key as a row: the keys of `json`, texts by their suffix, and `images` in archive order."""
    record: dict[str, Any] = {}
    name = key.encode(errors="surrogateescape").decode(errors="replace")

    if faults:
        return Raw(row, {}, name, "wrong_member", "; ".join(faults))
    try:
        if "json" in parts:
            content = json.loads(parts["json"])
            if not isinstance(content, dict):
                return Raw(
                    row, {}, name, "wrong_type", f"{name}.json holds a {type(content).__name__}; expected an object"
                )
            record |= content
        for suffix, content in parts.items():
            if suffix in TEXT_PARTS and suffix != "json":
                record[suffix] = content.decode()
    except UnicodeDecodeError as error:
        return Raw(row, {}, name, "bad_text", f"a text part of {name} is not UTF-8: {error}")
    except (ValueError, RecursionError) as error:
        return Raw(row, {}, name, "invalid_json", f"{name}.json: {error}")

    # `0.jpg`, `1.png` and so on are several images of one key; the last part of the suffix is the type.
    images = [content for suffix, content in parts.items() if suffix.rpartition(".")[2] in IMAGE_PARTS]
    if images:
        # The image itself replaces what the JSON says about it (a name, an original path).
        record = {name: value for name, value in record.items() if name not in ("image", "images", *IMAGE_PARTS)} | {
            "images": images
        }

    return Raw(row, record, name)


WEBDATASET = Format("webdataset", cut_tar, read_tar, suffixes=(".tar", ".tar.gz", ".tgz"))
