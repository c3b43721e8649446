"""Encoded images -> tiles, exactly as the Idefics3 image processor cuts them, left as bytes 0..255.

The stock processor first enlarges every image to `longest_edge`. Here small images keep their size unless `upscale` is
set, and `max_tiles` bounds the tiles. The device normalises the pixels, so only a quarter of the bytes travel there.
"""

import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from smolray.config import ImageConfig
from smolray.data import heif
from smolray.data.augment import Augmentation

heif.register()

MAX_IMAGE_SIZE = 4096  # the processor's own upper bound of an edge
# The operation that turns an image of each EXIF orientation upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Grid:
    """The tiles of an image: `rows` x `columns` crops, and the global view. 0 x 0 means the global view alone."""

    rows: int
    columns: int

    @property
    def tiles(self) -> int:
        return self.rows * self.columns + 1


class Tiler:
    """Cuts images into tiles by the processor's settings and the run's ImageConfig."""

    def __init__(
        self, processor: Idefics3ImageProcessorPil, config: ImageConfig, augmentation: Augmentation | None = None
    ):
        self.processor, self.augmentation = processor, augmentation
        self.config = config
        self.side = int(processor.max_image_size["longest_edge"])
        size = processor.size
        self.longest_edge = config.longest_edge or int(
            size["longest_edge"] if isinstance(size, dict) else size.longest_edge
        )
        self.splits = bool(processor.do_image_splitting)

    def target(self, width: int, height: int) -> int:
        """The longest edge in pixels to which an image of this size is scaled."""
        edge = self.longest_edge
        if not self.config.upscale:
            edge = min(edge, math.ceil(max(width, height) / self.side) * self.side)
        if self.config.max_tiles is not None:
            while edge > self.side and self._grid(width, height, edge).tiles > self.config.max_tiles:
                edge = (math.ceil(edge / self.side) - 1) * self.side
        return edge

    def grid(self, width: int, height: int) -> Grid:
        return self._grid(width, height, self.target(width, height))

    def _grid(self, width: int, height: int, edge: int) -> Grid:
        """The grid of an image whose longest edge is scaled to `edge` (as in Idefics3ImageProcessor._preprocess)."""
        if not self.splits:
            return Grid(0, 0)

        aspect = width / height
        if width >= height:
            width, height = edge, max(1, _even(int(edge / aspect)))
        else:
            height, width = edge, max(1, _even(int(edge * aspect)))

        if max(width, height) > MAX_IMAGE_SIZE:
            scale = MAX_IMAGE_SIZE / max(width, height)
            width, height = max(1, int(width * scale)), max(1, int(height * scale))

        aspect, side = width / height, self.side
        if width >= height:
            columns = math.ceil(width / side)
            rows = math.ceil(int(columns * side / aspect) / side)
        else:
            rows = math.ceil(height / side)
            columns = math.ceil(int(rows * side * aspect) / side)

        return Grid(rows, columns) if rows > 1 or columns > 1 else Grid(0, 0)

    def tiles(self, image: bytes) -> np.ndarray:
        """Tiles of one encoded image: (tiles, 3, side, side) uint8, row by row, the global view last."""
        decoded = decode(image)
        return self.cut(self.augmentation(image, decoded) if self.augmentation else decoded)

    def cut(self, decoded: Image.Image) -> np.ndarray:
        """The same of an image that `decode` returned."""
        edge = self.target(*decoded.size)

        out = self.processor.preprocess(
            [[decoded]],
            size={"longest_edge": edge},
            do_rescale=False,
            do_normalize=False,
            do_pad=False,
            return_tensors=None,
        )

        tiles = np.stack([np.asarray(tile).round().clip(0, 255).astype(np.uint8) for tile in out["pixel_values"][0]])
        return np.ascontiguousarray(tiles)  # the processor returns views of channels-last images


def image_size(image: bytes) -> tuple[int, int]:
    """(width, height) of what `decode` returns, from the header alone."""
    opened = Image.open(io.BytesIO(image))
    width, height = opened.size
    return (height, width) if _orientation(opened) >= 5 else (width, height)


def decode(image: bytes) -> Image.Image:
    """The image as a viewer shows it, in RGB.

    It is upright. Transparent pixels are white. Channels of 16 and 32 bits are scaled to 8.
    """
    decoded: Image.Image = Image.open(io.BytesIO(image))
    if (orientation := _orientation(decoded)) in UPRIGHT:
        decoded = decoded.transpose(UPRIGHT[orientation])

    if decoded.mode.startswith(("I", "F")):  # convert() would clip these at 255: a 16-bit image comes out white
        decoded = Image.fromarray(_eight_bits(np.asarray(decoded), decoded.mode))
    if decoded.has_transparency_data:  # convert() would show the colours under transparent pixels
        decoded = decoded.convert("RGBA")
        decoded = Image.alpha_composite(Image.new("RGBA", decoded.size, (255, 255, 255, 255)), decoded)
    return decoded.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 for none.

    Reads only the header: `getexif` of a PNG would decode it. PIL itself turns TIFF upright.
    """
    if "exif" not in image.info:
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # odd metadata raises anything at all, and is no reason to lose the image
        return 1
    return value if value in UPRIGHT else 1


def _eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Grey values of 16- and 32-bit modes as bytes. White is 65535 in mode I;16, the largest value in I and F."""
    values = np.nan_to_num(values.astype(np.float64))
    peak = 65535.0
    if not mode.startswith("I;16"):
        peak = (
            1.0 if mode == "F" and values.max() <= 1 else 255.0 if values.max() <= 255 else max(65535.0, values.max())
        )
    return (values / peak * 255).round().clip(0, 255).astype(np.uint8)


def _even(value: int) -> int:
    return value + value % 2
