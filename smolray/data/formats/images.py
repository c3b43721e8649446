"""Encoded images as they come in: which files are accepted, and the check that each image decodes completely.

In: an image value of a raw record (bytes, {bytes, path}, a path). Out: its bytes as they came, or a SampleError that
says what is wrong.
"""

import hashlib
import io
import posixpath
import re
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
from PIL import Image

from smolray import storage
from smolray.data.sample import SampleError

Image.init()  # without all plug-ins open() fails for formats that are registered but not loaded yet
# Only decoders that run inside PIL (EPS would start Ghostscript on an untrusted file), and only formats that have a
# signature.
FORMATS = tuple(
    f for f in ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO") if f in Image.OPEN
)
MAX_IMAGE_BYTES = 256 * 2**20
# Rows about one image are near each other in most data sets: remembering a few images avoids most repeated decodes.
REMEMBERED = 4096


def open_image(data: bytes, max_pixels: int) -> Image.Image:
    """Open an image: its header is read and its size checked, its pixels are decoded on first use.

    Raises SampleError (empty_image, image_too_large, corrupt_image).
    """
    if not data:
        raise SampleError("empty_image", "the image has no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is checked below
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise SampleError("image_too_large", f"{error}; the limit data.max_image_pixels is {max_pixels}") from error
    except Exception as error:  # decoders raise any error on hostile bytes
        raise SampleError(
            "corrupt_image", f"not an image ({_first_line(error)}); its first bytes are {data[:8]!r}"
        ) from error

    width, height = image.size
    if width * height > max_pixels:
        raise SampleError(
            "image_too_large", f"{width} x {height} pixels; the limit data.max_image_pixels is {max_pixels}"
        )

    if width == 0 or height == 0:
        raise SampleError("corrupt_image", f"the header says {width} x {height} pixels")
    return image


def check_image(data: bytes, max_pixels: int) -> None:
    """Decode the whole image (of an animation: its first frame).

    Raises SampleError, truncated_image among the reasons.
    """
    image = open_image(data, max_pixels)
    kind = image.format
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata is no reason to print
            image.verify()  # checksums; afterwards the object is spent
            open_image(data, max_pixels).load()
    except SampleError:
        raise
    except Exception as error:  # decoders raise any error on hostile bytes
        text = _first_line(error)
        torn = any(word in text.lower() for word in ("truncated", "broken data stream", "unexpected end"))
        reason = "truncated_image" if torn else "corrupt_image"
        raise SampleError(reason, f"{kind} image of {len(data)} bytes does not decode: {text}") from error


class ImageReader:
    """Turns the image values of one source file's records into checked bytes.

    Relative paths are taken from `folder` (that of the source file) and must stay inside `root` (the source as the
    person named it); absolute local paths are the person's own and are followed where the source is local. URLs are
    never fetched.
    """

    def __init__(self, folder: str, root: str, max_pixels: int):
        self.folder, self.root, self.max_pixels = folder, root, max_pixels
        self._sound: OrderedDict[bytes, None] = OrderedDict()

    def read(self, value: Any) -> bytes:
        """Raises SampleError: wrong_type, missing_file, path_escapes, or what check_image raises."""
        data = self._bytes(value)
        if len(data) > MAX_IMAGE_BYTES:
            raise SampleError("image_too_large", f"{len(data)} bytes; the limit of a file is {MAX_IMAGE_BYTES}")
        digest = hashlib.blake2b(data, digest_size=16).digest()
        if digest in self._sound:
            self._sound.move_to_end(digest)
            return data
        check_image(data, self.max_pixels)
        self._sound[digest] = None
        if len(self._sound) > REMEMBERED:
            self._sound.popitem(last=False)
        return data

    def _bytes(self, value: Any) -> bytes:
        if isinstance(value, dict):
            if value.get("bytes") is not None:
                value = value["bytes"]
            elif value.get("path"):
                value = value["path"]
            else:
                raise SampleError("empty_image", "the image struct holds neither bytes nor a path")
        if isinstance(value, (bytes, bytearray, memoryview)):
            return bytes(value)
        if isinstance(value, str):
            return self._file(value)
        raise SampleError(
            "wrong_type", f"an image is a {type(value).__name__}; expected bytes, a path or {{bytes, path}}"
        )

    def _file(self, path: str) -> bytes:
        uri = self._resolve(path)
        try:
            fs, inner = storage.filesystem(uri)
            info = fs.get_file_info(inner)
            if info.type != pafs.FileType.File:  # no folders, pipes or devices
                raise SampleError("missing_file", f"image {path!r} is not a file at {uri}")
            if info.size > MAX_IMAGE_BYTES:
                raise SampleError(
                    "image_too_large", f"{path!r} has {info.size} bytes; the limit of a file is {MAX_IMAGE_BYTES}"
                )
            with fs.open_input_stream(inner) as stream:
                return stream.read()
        except (OSError, UnicodeEncodeError) as error:
            raise SampleError("missing_file", f"image {path!r} cannot be read: {_first_line(error)}") from error

    def _resolve(self, path: str) -> str:
        if not path or "\0" in path:
            raise SampleError("missing_file", f"{path!r} is not a path of an image")
        if "://" in path:
            raise SampleError(
                "missing_file",
                f"image {path[:200]!r} is a URL, which is not fetched; download the images next to the data",
            )
        if posixpath.isabs(path):
            if not storage.is_local(self.root):
                raise SampleError(
                    "path_escapes",
                    f"image path {path!r} is absolute, but the data is at {self.root}; use relative paths",
                )
            return path
        scheme, slashes, folder = self.folder.rpartition("://")
        joined = scheme + slashes + posixpath.normpath(posixpath.join(folder, path))
        if joined != self.root and not joined.startswith(self.root.rstrip("/") + "/"):
            hint = f"name a folder that holds both the data and the images as the source, instead of {self.root}"
            raise SampleError("path_escapes", f"image path {path!r} leads out of the data folder; {hint}")
        return joined


def folder_of(uri: str) -> str:
    """The folder that holds the file `uri`."""
    return str(Path(uri).parent) if storage.is_local(uri) else uri.rsplit("/", 1)[0]


def _first_line(error: Exception) -> str:
    line = (str(error) or type(error).__name__).splitlines()[0]
    # PIL names the stream by its address, each time another
    return re.sub(r"\s*<_io\.\w+ object at 0x\w+>", "", line)[:300]
