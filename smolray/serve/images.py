"""The images of a request: data URIs, and URLs of hosts that the operator has named.

In: the URL of an image part. Out: the bytes of a sound image, or an ApiError. Files of this machine are never read.
"""

from collections.abc import Collection

from smolray.data.formats.fetch import fetch
from smolray.data.formats.images import ImageReader
from smolray.data.formats.inline import inline_bytes
from smolray.data.sample import SampleError
from smolray.serve.errors import ApiError


def image_checks(max_pixels: int) -> ImageReader:
    """What checks images of a model, each once; it opens no file."""
    return ImageReader("", "", max_pixels)


def read_image(url: str, checks: ImageReader, hosts: Collection[str]) -> bytes:
    """The encoded image at `url`. `hosts`: those that http(s) images are fetched from. Raises ApiError (400)."""
    param = "messages"
    start = url[:8].lower()
    try:
        if start.startswith("data:"):
            data = inline_bytes(url) or b""
        elif start.startswith(("http://", "https://")):
            data = fetch(url, hosts=hosts)
        else:
            raise ApiError(400, "an image is neither a data: URI nor an http(s) URL", "invalid_image_url", param)
        return checks.read(data)
    except SampleError as error:
        raise ApiError(400, f"{error.reason}: {error}", "invalid_image", param) from error
