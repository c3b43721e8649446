"""Encoded images as they come in: which files are accepted, and the check that each image decodes completely.

In: an image value of a raw record (bytes, {bytes, path, url}, a path, a URI, base64). Out: its bytes as they came, or a
SampleError that says what is wrong.
"""

import hashlib
import io
import re
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

from PIL import Image

from smolray import storage
from smolray.config import DataConfig
from smolray.data import heif
from smolray.data.formats.fetch import fetch
from smolray.data.formats.inline import inline_bytes
from smolray.data.formats.places import MAX_IMAGE_BYTES, ImagePlaces, shown_path
from smolray.data.formats.source import ReadTask
from smolray.data.sample import SampleError

HEIC_IS_READ = heif.register()
Image.init()  # without all plug-ins open() fails for formats that are registered but not loaded yet
# Only decoders that run inside PIL (EPS would start Ghostscript on an untrusted file), and only formats that have a
# signature.
FORMATS = tuple(
    f
    for f in ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "HEIF")
    if f in Image.OPEN
)
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
        raise SampleError("corrupt_image", _kind_of(data) or f"not an image ({_first_line(error)})") from error

    width, height = image.size
    if width * height > max_pixels:
        raise SampleError(
            "image_too_large", f"{width} x {height} pixels; the limit data.max_image_pixels is {max_pixels}"
        )

    if width == 0 or height == 0:
        raise SampleError("corrupt_image", f"the header says {width} x {height} pixels")
    return image


def _kind_of(data: bytes) -> str:
    """What a file that is no readable image is instead, and what to do; empty where that is not known."""
    if data[4:8] == b"ftyp" and data[8:11] in (b"hei", b"hev", b"mif", b"msf"):
        needs = "which needs pillow-heif: pip install 'smolray[heic]', or write it as JPEG"
        return "a HEIC image, which does not decode" if HEIC_IS_READ else f"a HEIC image, {needs}"
    head = data[:1000].lstrip().lower()
    kinds = {b"%pdf": "PDF", b"%!ps": "PostScript", b"8bps": "Photoshop", b"\xff\x0a": "JPEG XL", b"{": "JSON"}
    kind = next((name for start, name in kinds.items() if head.startswith(start)), "")
    kind = "SVG" if b"<svg" in head else kind or ("HTML" if head.startswith((b"<!doctype html", b"<html")) else "")
    return f"not an image that is read: its content is {kind}; write it as PNG or JPEG" if kind else ""


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

    Values are bytes, data URIs, base64, paths and URIs, or {bytes, path, url}. Paths are those of ImagePlaces; http(s)
    URLs are fetched only where `fetch_urls` says so.
    """

    def __init__(
        self,
        folder: str,
        root: str,
        max_pixels: int,
        image_root: str = "",
        anywhere: bool = False,
        fetch_urls: bool = False,
    ):
        self.places, self.max_pixels = ImagePlaces(folder, root, image_root, anywhere), max_pixels
        self.fetch_urls = fetch_urls
        self._sound: OrderedDict[bytes, None] = OrderedDict()

    def read(self, value: Any) -> bytes:
        """Raises SampleError: wrong_type, missing_file, path_escapes, or what check_image raises."""
        data = self._bytes(value)
        if len(data) > MAX_IMAGE_BYTES:
            raise SampleError("image_too_large", f"{len(data)} bytes; the limit of a file is {MAX_IMAGE_BYTES}")
        digest = hashlib.blake2b(data, digest_size=16).digest()
        if digest not in self._sound:
            check_image(data, self.max_pixels)
        self._sound.pop(digest, None)  # threads may share a reader: no step fails when another was faster
        self._sound[digest] = None
        if len(self._sound) > REMEMBERED:
            self._sound.popitem(last=False)
        return data

    def _bytes(self, value: Any) -> bytes:
        if isinstance(value, dict):
            filled = [value[key] for key in ("bytes", "path", "url") if value.get(key) not in (None, "")]
            if not filled:
                raise SampleError("empty_image", "the image struct holds neither bytes nor a path nor a url")
            value = filled[0]
        if isinstance(value, (bytes, bytearray, memoryview)):
            return bytes(value)
        if not isinstance(value, str):
            found = f"an image is a {type(value).__name__}; expected bytes, a path or {{bytes, path, url}}"
            raise SampleError("wrong_type", found)

        if (inline := inline_bytes(value)) is not None:
            return inline
        if value[:8].lower().startswith(("http://", "https://")):
            return self._fetched(value)
        return self.places.read(value)

    def _fetched(self, url: str) -> bytes:
        if not self.fetch_urls:
            shown = shown_path(url.partition("?")[0])
            hint = "download the images next to the data, or set data.fetch_urls=true"
            raise SampleError("missing_file", f"image {shown!r} is a URL, which is not fetched; {hint}")
        return fetch(url)


def image_reader(task: ReadTask, data: DataConfig) -> ImageReader:
    """The reader for the images of a read task's rows. Rows of an archive name no files outside of it."""
    archive = task.format == "webdataset" or (task.format == "hub" and not storage.exists(task.root))
    root = "" if archive else task.root
    return ImageReader(
        folder_of(task.uri),
        root,
        data.max_image_pixels,
        storage.absolute(data.image_root) if data.image_root else "",
        data.allow_absolute_paths,
        data.fetch_urls,
    )


def folder_of(uri: str) -> str:
    """The folder that holds the file `uri`."""
    return str(Path(uri).parent) if storage.is_local(uri) else uri.rsplit("/", 1)[0]


def _first_line(error: Exception) -> str:
    line = (str(error) or type(error).__name__).splitlines()[0]
    # PIL names the stream by its address, each time another
    return re.sub(r"\s*<_io\.\w+ object at 0x\w+>", "", line)[:300]
