"""Tiles: the stock processor's to the byte where the run asks for its behaviour, bounded and never decoded in vain
where it does not.
"""

import io
import random

import numpy as np
import pytest
from PIL import ExifTags, Image

from smolray.config import ImageConfig, ModelConfig
from smolray.data.processor import load_processor
from smolray.data.tiles import Tiler, decode, image_size
from tests.offline import picture


@pytest.fixture
def stock(tiny_path):
    """A processor of its own, so that a test may set its size."""
    return load_processor(ModelConfig(path=tiny_path)).image_processor


def sizes(seed, count, most):
    rng = random.Random(seed)
    return [(rng.randint(1, most), rng.randint(1, most)) for _ in range(count)] + [
        (1, 1),
        (1, most),
        (most, 1),
        (64, 64),
        (65, 64),
        (64, 129),
    ]


def stock_tiles(stock, image):
    out = stock([[decode(image)]], do_rescale=False, do_normalize=False, return_tensors="np", return_row_col_info=True)
    return out["pixel_values"][0].round().clip(0, 255).astype(np.uint8), out["rows"][0][0], out["cols"][0][0]


@pytest.mark.parametrize("longest_edge", [64, 256, 320])
def test_with_upscale_tiles_are_those_of_the_stock_processor(stock, longest_edge):
    stock.size = {"longest_edge": longest_edge}
    tiler = Tiler(stock, ImageConfig(upscale=True))
    for number, (width, height) in enumerate(sizes(longest_edge, 14, 400)):
        image = picture(width, height, number)
        want, rows, columns = stock_tiles(stock, image)
        grid = tiler.grid(width, height)
        assert (grid.rows, grid.columns) == (rows, columns), (width, height)
        np.testing.assert_array_equal(tiler.tiles(image), want, err_msg=f"{width} x {height}")


def test_pixels_are_those_the_stock_processor_normalises(stock):
    stock.size = {"longest_edge": 192}
    image = picture(200, 130)
    want = stock([[decode(image)]], return_tensors="np")["pixel_values"][0]
    got = (Tiler(stock, ImageConfig(upscale=True)).tiles(image).astype(np.float32) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("upscale", [False, True])
def test_the_grid_is_known_without_decoding(stock, upscale):
    for longest_edge in (64, 192, 512):
        tiler = Tiler(stock, ImageConfig(upscale=upscale, longest_edge=longest_edge))
        for width, height in sizes(longest_edge + 1, 8, 600):
            image = picture(width, height)
            assert len(tiler.tiles(image)) == tiler.grid(*image_size(image)).tiles, (width, height, longest_edge)


@pytest.mark.parametrize("most", [1, 2, 3, 5, 10, 17])
def test_no_image_has_more_tiles_than_max_tiles(stock, most):
    for upscale in (False, True):
        tiler = Tiler(stock, ImageConfig(longest_edge=1024, max_tiles=most, upscale=upscale))
        for width, height in sizes(most, 400, 5000):
            assert 1 <= tiler.grid(width, height).tiles <= most, (width, height)
        bounded = picture(900, 400)
        assert len(tiler.tiles(bounded)) == tiler.grid(900, 400).tiles


def test_small_images_are_not_enlarged_beyond_the_next_tile(stock):
    tiler = Tiler(stock, ImageConfig(longest_edge=1024))
    assert tiler.grid(40, 30).tiles == 1 and len(tiler.tiles(picture(40, 30))) == 1
    for width, height in sizes(3, 300, 900):
        assert tiler.target(width, height) < max(width, height) + tiler.side
    whole = picture(64, 64, 5)
    # not touched at all
    np.testing.assert_array_equal(tiler.tiles(whole)[0].transpose(1, 2, 0), np.asarray(decode(whole)))
    assert Tiler(stock, ImageConfig(longest_edge=1024, upscale=True)).grid(40, 40).tiles == 16 * 16 + 1


def colour(image):
    return np.asarray(decode(image)).reshape(-1, 3).mean(0).round().astype(int).tolist()


def saved(array, form="PNG", mode=None, **options):
    sink = io.BytesIO()
    made = Image.fromarray(array)
    (made.convert(mode) if mode else made).save(sink, form, **options)
    return sink.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "F"])
def test_every_colour_mode_gives_rgb_tiles(stock, mode):
    form = "TIFF" if mode in ("CMYK", "YCbCr", "F") else "PNG"
    image = picture(100, 70, mode=mode, form=form)
    assert decode(image).mode == "RGB"
    tiles = Tiler(stock, ImageConfig(longest_edge=128)).tiles(image)
    assert tiles.shape == (5, 3, 64, 64) and tiles.dtype == np.uint8 and tiles.std() > 10


def test_sixteen_bits_are_scaled_and_not_clipped_to_white():
    for value in (0, 1000, 32768, 65535):
        assert colour(saved(np.full((8, 8), value, np.uint16))) == [round(value / 257)] * 3
    assert colour(saved(np.full((8, 8), 0.5, np.float32), "TIFF")) == [128] * 3
    ramp = np.linspace(0, 65535, 64).astype(np.int32).reshape(8, 8)
    assert abs(colour(saved(ramp, "TIFF"))[0] - 127) <= 1


def test_transparent_pixels_are_white_as_in_the_stock_processor(stock):
    hidden = np.zeros((64, 64, 4), np.uint8)
    hidden[..., 0] = 200  # red, and fully transparent
    hidden[:32, :, 3] = 255
    for form in ("PNG", "WEBP"):
        image = saved(hidden, form, lossless=True)
        assert colour(saved(hidden[32:], form, lossless=True)) == [255, 255, 255]
        got = Tiler(stock, ImageConfig(upscale=True)).tiles(image)
        raw = Image.open(io.BytesIO(image))
        want = stock([[raw]], do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(got, want.round().astype(np.uint8))
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    sink = io.BytesIO()
    palette.save(sink, "PNG", transparency=0)
    assert colour(sink.getvalue()) == [255, 255, 255]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_seen_upright_whatever_its_exif_says(form, orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = picture(90, 40, form=form, exif=exif.tobytes())
    want = ImageOps.exif_transpose(Image.open(io.BytesIO(image))).convert("RGB")
    assert image_size(image) == want.size == decode(image).size
    np.testing.assert_array_equal(np.asarray(decode(image)), np.asarray(want))


def test_broken_exif_does_not_lose_the_picture():
    image = picture(90, 40, form="JPEG", exif=b"Exif\0\0" + b"\xff" * 40)
    assert decode(image).size == image_size(image) == (90, 40)
