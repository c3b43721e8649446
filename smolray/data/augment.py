"""Random changes of training images, in Pillow: none changes the size, so tiles and tokens stay as they were counted.

In: an image, the seed of the run and the epoch. Out: the image as it is trained in this epoch. It depends on these and
on the bytes of the image alone, so it is the same for any number of workers and after a resume.
"""

import io
from collections.abc import Callable, Sequence
from hashlib import blake2b

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

WHITE = (255, 255, 255)


class Augmentation:
    """The changes of one epoch of a run, in the order of their names in `CHANGES`."""

    def __init__(self, names: Sequence[str], seed: int, epoch: int):
        self.changes = [change for name, change in CHANGES.items() if name in names]
        self.seed, self.epoch = seed, epoch

    def __call__(self, encoded: bytes, image: Image.Image) -> Image.Image:
        """The image as it is trained; `encoded`: its file, which says which random numbers it gets."""
        picture = int.from_bytes(blake2b(encoded, digest_size=8).digest(), "big")
        for number, change in enumerate(self.changes):
            image = change(image, np.random.default_rng([self.seed, self.epoch, picture, number]))
        return image


def _flip(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def _crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A part with 80 to 100 % of each edge, scaled to the size of the whole."""
    width, height = image.size
    share = rng.uniform(0.8, 1.0)
    left, top = rng.uniform(0, (1 - share) * width), rng.uniform(0, (1 - share) * height)
    box = (left, top, left + share * width, top + share * height)
    return image.resize(image.size, Image.Resampling.BICUBIC, box=box)


def _rotate(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return image.rotate(rng.uniform(-10, 10), Image.Resampling.BICUBIC, fillcolor=WHITE)


def _color(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(rng.uniform(0.8, 1.2))
    return image


def _gray(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return image.convert("L").convert("RGB") if rng.random() < 0.2 else image


def _blur(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.5)))


def _jpeg(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Written as a JPEG of quality 40 to 95 and read again."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(rng.integers(40, 96)))
    return Image.open(file).convert("RGB")


CHANGES: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "flip": _flip,
    "crop": _crop,
    "rotate": _rotate,
    "color": _color,
    "gray": _gray,
    "blur": _blur,
    "jpeg": _jpeg,
}
