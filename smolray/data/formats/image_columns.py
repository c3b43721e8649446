"""The columns of a record that hold its images, and what a value that may be an image looks like.

In: a Row. Out: its image values (bytes, {bytes, path}, a path, a URI) in order, which ImageReader reads.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from smolray.data.formats.columns import Row
from smolray.data.formats.values import is_empty, list_of, parsed_list
from smolray.data.sample import SampleError

IMAGE_COLUMNS = (
    *("images", "image", "jpg", "jpeg", "png", "webp", "img", "imgs", "picture", "pictures", "photo", "photos"),
    *("pic", "pics", "decoded_image", "image_path", "image_paths", "img_path", "img_paths", "image_file"),
    *("image_files", "image_filename", "image_bytes", "image_base64", "image_url", "image_urls", "img_url"),
)
# Names that often hold other things: taken where the value looks like an image.
WEAK_COLUMNS = ("file_name", "filename", "file_path", "filepath", "image_name", "path", "file", "url", "screenshot")
SIDES = (("left", "right"), ("before", "after"), ("a", "b"), ("first", "second"))

_NUMBERED = re.compile(
    r"(?:image|img|picture|photo|pic)s?(?:_?(?:path|file|url))?[_-]?(\d{1,3})(?:_?(?:path|file|url))?", re.IGNORECASE
)
_IMAGE_ENDING = re.compile(
    r"[^\n\r]{1,1024}\.(?:jpe?g|jfif|png|webp|gif|bmp|tiff?|ppm|pgm|pbm|jp2|avif|hei[cf]|svg|ico)(?:[?#]\S*)?\s*",
    re.IGNORECASE,
)
_SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP", b"P4", b"P5", b"P6")


def image_kind(value: Any) -> str:
    """What makes a value look like one or more images; empty where nothing does.

    It is "image bytes", "a data URI", "a URL of an image" or "a path of an image".
    """
    if isinstance(value, str) and (listed := parsed_list(value)) is not None:
        value = listed
    if isinstance(value, list | tuple):
        return next(filter(None, map(image_kind, value[:8])), "")
    if isinstance(value, Mapping):
        inner = (value.get(key) for key in ("bytes", "path", "url", "image", "image_url"))
        return next(filter(None, map(image_kind, inner)), "")

    if isinstance(value, bytes | bytearray | memoryview):
        return "image bytes" if _is_image(bytes(value[:16])) else ""
    if not isinstance(value, str):
        return ""
    if value[:11].lower() == "data:image/":
        return "a data URI"
    if _IMAGE_ENDING.fullmatch(value):
        return "a URL of an image" if re.match(r"https?://", value, re.IGNORECASE) else "a path of an image"
    return ""


def _is_image(head: bytes) -> bool:
    return head.startswith(_SIGNATURES) or head[8:12] == b"WEBP" or head[4:8] == b"ftyp"


def image_columns(row: Row) -> list[str]:
    """The columns that hold the row's images.

    Those that data.columns.image names; else numbered or paired columns, or the first known column with a value, bytes
    before paths.
    """
    if named := row.data.columns.image:
        columns = [named] if isinstance(named, str) else list(named)
        return [c for c in columns if not is_empty(row.record[c])]

    known = [
        c for c in dict.fromkeys(map(row.find, ((n,) for n in IMAGE_COLUMNS))) if c and not is_empty(row.record[c])
    ]
    numbered = _numbered_columns(row)
    if known and not (len(known) == 1 and numbered and numbered[0][0] > 1):
        embedded = (c for c in known if image_kind(row.record[c]) == "image bytes")
        return [next(embedded, known[0])]

    if numbered:
        return known + [column for _, column in numbered]
    if sides := _paired_columns(row):
        return sides
    weak = (row.find((name,)) for name in WEAK_COLUMNS)
    return [c for c in weak if c and image_kind(row.record[c])][:1]


def _numbered_columns(row: Row) -> list[tuple[int, str]]:
    """(number, column) of `image_1`, `image_2` …, in order, where they hold a value."""
    found = []
    for column, value in row.record.items():
        if (match := _NUMBERED.fullmatch(column)) and not is_empty(value) and not isinstance(value, int | float):
            found.append((int(match[1]), column))
    return sorted(found)


def _paired_columns(row: Row) -> list[str]:
    """Two columns such as `left` and `right_image`, where both hold what looks like an image."""
    for pair in SIDES:
        for form in ("{}", "{}_image", "image_{}", "{}_img", "img_{}", "{}_image_path", "image_path_{}"):
            columns = [row.find((form.format(side),)) for side in pair]
            if all(columns) and all(image_kind(row.record[c]) for c in columns):
                return columns
    return []


def has_image(row: Row) -> bool:
    """Whether an image column holds anything."""
    return bool(image_columns(row))


def image_values(row: Row, embedded: list[Any]) -> list[Any]:
    """Image values in order: those inside the messages, else those of the image columns, which are then used."""
    columns = image_columns(row)
    if embedded and columns:
        raise SampleError(
            "image_count", f"images both inside the messages and in column {columns[0]!r}: it is not clear which to use"
        )
    return embedded or [value for c in columns for value in _values(row.use(c, "image"), c)]


def _values(value: Any, column: str) -> Iterator[Any]:
    if isinstance(value, list | tuple) or (isinstance(value, str) and parsed_list(value) is not None):
        yield from list_of(value, column)
    else:
        yield value
