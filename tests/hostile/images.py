"""Images that do not decode, are not images, or are odd and fine all the same."""

import io
import struct
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.hostile.case import Case, encoded, good, lines, mixed, some


def corrupt_pixels(rng, folder):
    def flip():
        data = bytearray(encoded(rng, size=(20, 20)))
        data[data.index(b"IDAT") + rng.randint(6, 600)] ^= rng.randint(1, 255)
        return good(rng, image=bytes(data))

    bad = some(rng, flip)
    return Case(mixed(rng, folder, bad), {"corrupt_image|truncated_image": len(bad)})


def truncated_images(rng, folder):
    def cut():
        data = encoded(rng, rng.choice(["PNG", "JPEG", "WEBP", "GIF", "BMP"]), size=(40, 40))
        return good(rng, image=data[: int(len(data) * rng.uniform(0.1, 0.9))])

    bad = some(rng, cut)
    return Case(mixed(rng, folder, bad), {"corrupt_image|truncated_image": len(bad)})


def zero_byte_images(rng, folder):
    bad = some(rng, lambda: good(rng, image=b""))
    return Case(mixed(rng, folder, bad), {"empty_image": len(bad)})


def decompression_bombs(rng, folder):
    def bomb():
        def chunk(name, body):
            return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

        header = struct.pack(">IIBBBBB", rng.randint(5_000, 2**30), rng.randint(5_000, 2**30), 8, 2, 0, 0, 0)
        data = zlib.compress(bytes(rng.randint(1, 9999)))
        return good(
            rng, image=b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
        )

    bad = some(rng, bomb)
    return Case(mixed(rng, folder, bad), {"image_too_large": len(bad)})


def bytes_that_are_no_image(rng, folder):
    kinds = [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7\n",
        b"GIF89a",
        b"\xff\xd8\xff",
    ]
    bad = some(
        rng, lambda: good(rng, image=rng.choice([*kinds, rng.randbytes(rng.randint(1, 300)), b"<html>404</html>"]))
    )
    return Case(mixed(rng, folder, bad), {"corrupt_image|truncated_image": len(bad)})


def odd_colour_modes(rng, folder):
    images = [encoded(rng, "PNG", mode) for mode in ("P", "LA", "1", "L", "RGBA", "I;16")] + [
        encoded(rng, "JPEG", m) for m in ("CMYK", "L")
    ]
    rng.shuffle(images)
    return Case(mixed(rng, folder, [good(rng, image=i) for i in images]), images=images)


def animations(rng, folder):
    def animation():
        frames = [Image.new("RGB", (9, 9), (rng.randint(0, 255), n, 0)) for n in range(rng.randint(2, 6))]
        sink = io.BytesIO()
        frames[0].save(sink, rng.choice(["GIF", "WEBP", "PNG"]), save_all=True, append_images=frames[1:])
        return sink.getvalue()

    images = some(rng, animation)
    return Case(mixed(rng, folder, [good(rng, image=i) for i in images]), images=images)


def several_images_a_row(rng, folder):
    images = [[encoded(rng) for _ in range(rng.randint(2, 5))] for _ in range(3)]
    record = [{"images": i, "question": "compare", "answer": "same"} for i in images]
    pq.write_table(pa.Table.from_pylist(record), folder / "x.parquet")
    return Case(3, images=[i for row in images for i in row])


def image_counts_that_differ(rng, folder):
    def record():
        marks = rng.choice([0, 2, 3])
        turns = [{"from": "human", "value": "<image>\n" * marks + "q"}, {"from": "gpt", "value": "a"}]
        return {
            "image": "good.png" if marks else ["good.png"] * 2,
            "conversations": [*turns, {"from": "human", "value": "<image>" if not marks else ""}],
        }

    bad = some(rng, record)
    return Case(lines(rng, folder, bad), {"image_count": len(bad)})
