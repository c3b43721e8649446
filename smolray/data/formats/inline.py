"""Images written into a text: data URIs, and plain base64 where it can be nothing else.

In: a text. Out: the bytes in it, or None where it is a path or a URL.
"""

import base64
import binascii
import re
from urllib.parse import unquote_to_bytes

from smolray.data.sample import SampleError

# How the base64 of image files begins: PNG, JPEG, GIF, WebP, TIFF, BMP and HEIC or AVIF.
_BASE64_OF_IMAGE = re.compile(r"iVBORw0KGgo|/9j/|R0lGOD|UklGR|SUkqA|TU0AK|Qk0|Qk1|AAAA[A-Za-z0-9+/]{2}Zu?ZnR5c")
_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]+={0,2}\s*")
SHORTEST = 64  # characters; file names are shorter, or have a dot


def inline_bytes(text: str) -> bytes | None:
    """The bytes of a data URI or of a base64 text; None where it is neither. Raises SampleError (corrupt_image)."""
    if text[:5].lower() == "data:":
        header, comma, content = text[5:].partition(",")
        if not comma:
            raise SampleError("corrupt_image", f"a data: URI of {len(text)} characters has no comma before its content")
        return _decoded(content) if header.lower().rstrip().endswith(";base64") else unquote_to_bytes(content)
    if len(text) >= SHORTEST and _BASE64_OF_IMAGE.match(text) and _BASE64.fullmatch(text):
        return _decoded(text)
    return None


def _decoded(text: str) -> bytes:
    text = "".join(text.split()).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise SampleError("corrupt_image", f"{len(text)} characters of base64 do not decode: {error}") from error
