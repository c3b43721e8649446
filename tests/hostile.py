"""Makers of hostile input, one a class: each writes files into a folder from a seeded generator and says what must
become of their rows.
"""

import io
import json
import os
import struct
import tarfile
import zlib
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from smolray.data.formats import layouts as parsers


@dataclass
class Case:
    """Files written into a folder, and what must become of their rows."""

    rows: int
    bad: dict[str, int] = field(default_factory=dict)  # "a|b": either reason
    error: str = ""  # the source as a whole is refused with this message
    images: list[bytes] | None = None  # all of these are in the shards, byte for byte
    texts: list[str] | None = None  # so are these


def encoded(rng, kind="PNG", mode="RGB", size=None) -> bytes:
    size = size or (rng.randint(2, 24), rng.randint(2, 24))
    noise = np.frombuffer(rng.randbytes(size[0] * size[1] * 3), "u1").reshape(size[1], size[0], 3)
    sink = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(sink, kind)
    return sink.getvalue()


def good(rng, **more):
    return {"image": encoded(rng), "question": f"question {rng.random()}", "answer": "yes"} | more


def mixed(rng, folder, bad):
    """Bad records among good ones, as JSON-free Parquet of one schema; returns how many there are in all."""
    records = [good(rng) for _ in range(rng.randint(2, 5))] + bad
    rng.shuffle(records)
    names = sorted({name for r in records for name in r})
    pq.write_table(
        pa.Table.from_pylist([{n: r.get(n) for n in names} for r in records]), folder / "x.parquet", row_group_size=3
    )
    return len(records)


def lines(rng, folder, bad, name="x.jsonl"):
    """Bad lines (bytes, or records) among good ones as JSON lines with image files."""
    (folder / "good.png").write_bytes(encoded(rng))
    records = [{"image": "good.png", "question": "q", "answer": "a"} for _ in range(rng.randint(2, 5))] + bad
    rng.shuffle(records)
    (folder / name).write_bytes(b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in records))
    return len(records)


def tar_of(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def some(rng, make, most=4):
    return [make() for _ in range(rng.randint(1, most))]


# Images


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


# Text


def unicode_text(rng, folder):
    texts = [
        "日本語の質問",
        "שאלה\u200f",
        "👩‍👩‍👧‍👦 e\u0301 ﬁ",
        "\u2028line\u2029",
        "𝒳" * rng.randint(1, 9),
        "\ufeffbom",
        "تاريخ",
    ]
    rng.shuffle(texts)
    return Case(mixed(rng, folder, [good(rng, question=t, answer=t) for t in texts]), texts=texts)


def special_tokens_in_text(rng, folder):
    tokens = [
        "<image>",
        "<end_of_utterance>",
        "<fake_token_around_image>",
        "<|im_start|>",
        "<global-img>",
        "<row_1_col_1>",
        "</s>",
    ]
    texts = ["what is " + "".join(rng.sample(tokens, 3)) for _ in range(4)]
    return Case(mixed(rng, folder, [good(rng, question=t, answer=t) for t in texts]), texts=texts)


def nul_bytes(rng, folder):
    texts = [f"a\0b{n}\0" for n in range(rng.randint(1, 4))]
    bad = some(rng, lambda: {"image": "good\0.png", "question": "q", "answer": "a"})
    return Case(
        lines(rng, folder, [{"question": t, "answer": t} for t in texts] + bad), {"missing_file": len(bad)}, texts=texts
    )


def enormous_text(rng, folder):
    text = "word " * rng.randint(100_000, 300_000)
    bad = [good(rng, question="x" * (parsers.MAX_TEXT + 1))] if rng.random() < 0.3 else []
    return Case(mixed(rng, folder, [good(rng, question=text), *bad]), {"text_too_long": 1} if bad else {}, texts=[text])


def text_that_is_not_unicode(rng, folder):
    kinds = [
        b'{"question": "\\ud800", "answer": "a"}',
        b'{"question": "\xff\xfe", "answer": "a"}',
        b'{"question": "q", "answer": "x\\udfff"}',
    ]
    bad = some(rng, lambda: rng.choice(kinds))
    return Case(lines(rng, folder, bad), {"bad_text": len(bad)})


def empty_answers(rng, folder):
    bad = some(rng, lambda: good(rng, answer=rng.choice(["", " ", "\n\t "])))
    return Case(mixed(rng, folder, bad), {"empty_answer": len(bad)})


def mixed_text_only_rows(rng, folder):
    texts = [f"no image {rng.random()}" for _ in range(rng.randint(1, 9))]
    return Case(mixed(rng, folder, [good(rng, image=None, question=t) for t in texts]), texts=texts)


# Structure


def wrong_columns(rng, folder):
    names = rng.sample(["foo", "bar", "baz", "pixels", "target"], 2)
    pq.write_table(pa.table({n: ["x"] * 3 for n in names}), folder / "x.parquet")
    return Case(3, error=f"x.parquet: no known layout; columns found: {names[0]}, {names[1]}; expected messages")


def wrong_types(rng, folder):
    records = [
        {"question": ["a"], "answer": "a"},
        {"question": "q", "answer": {"x": 1}},
        {"question": "q", "answer": float("nan")},
        {"image": 7, "question": "q", "answer": "a"},
        {"image": [["good.png"]], "question": "q", "answer": "a"},
        {"messages": "hello"},
        {"messages": ["hello"]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
        {"conversations": [{"from": "human"}]},
        {"chosen": "a", "rejected": ["b"]},
        {"prompt": 1, "completion": "x"},
        {"texts": [["a", "b"]]},
    ]
    bad = [*rng.sample(records, rng.randint(3, 9)), b"[1, 2]", b'"text"', b"null", b"3"]
    return Case(lines(rng, folder, bad), {"wrong_type": len(bad)})


def conversations_without_a_turn(rng, folder):
    user = {"role": "user", "content": "hi"}
    kinds = [
        {"messages": []},
        {"messages": [user]},
        {"conversations": []},
        {"texts": []},
        {"chosen": [user], "rejected": [user]},
    ]
    bad = some(rng, lambda: rng.choice(kinds), 6)
    return Case(lines(rng, folder, bad), {"no_turn": len(bad)})


def wrong_roles(rng, folder):
    def record():
        role = rng.choice(["tool", "", "USER", "bot", None, 3])
        if rng.random() < 0.5:
            return {"messages": [{"role": role, "content": "x"}, {"role": "assistant", "content": "y"}]}
        return {"conversations": [{"from": role, "value": "x"}, {"from": "gpt", "value": "y"}]}

    bad = some(rng, record)
    return Case(lines(rng, folder, bad), {"wrong_role": len(bad)})


# Files


def empty_parquet(rng, folder):
    pq.write_table(
        pa.table({"question": pa.array([], pa.string()), "answer": pa.array([], pa.string())}), folder / "x.parquet"
    )
    return Case(0)


def damaged_parquet(rng, folder):
    rows = mixed(rng, folder, [good(rng) for _ in range(20)])
    data = bytearray((folder / "x.parquet").read_bytes())
    if rng.random() < 0.5:
        (folder / "x.parquet").write_bytes(data[: rng.randint(0, len(data) - 5)])
        return Case(rows, error="x.parquet is not a readable Parquet file .*; download it again")
    at = rng.randint(4, len(data) // 2)
    data[at : at + 400] = rng.randbytes(400)
    (folder / "x.parquet").write_bytes(data)
    return Case(rows, {"*": -1})  # what is damaged is up to the bytes: every row is accounted for all the same


def invalid_json_lines(rng, folder):
    kinds = [
        b"{",
        b'{"question": "q", "answer"',
        b"not json",
        b"{'question': 'q'}",
        b"[" * 100_000,
        b'{"a": 1}}',
        b'{"a": ' + b"9" * 5000 + b"}",
    ]
    bad = some(rng, lambda: rng.choice(kinds), 5)
    return Case(lines(rng, folder, bad), {"invalid_json": len(bad)})


def torn_json_lists(rng, folder):
    text = json.dumps([{"question": f"q{n}", "answer": "a"} for n in range(9)])
    (folder / "x.json").write_text(text[: rng.randint(1, len(text) - 1)] if rng.random() < 0.7 else text + "{}")
    return Case(9, error="x.json(: more follows behind the end of the JSON list| is not a whole JSON list: at byte)")


def missing_files(rng, folder):
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    names = ["gone.png", "a/b/gone.png", "folder.png", "pipe.png", "/dev/zero", "https://x.org/a.png", "x" * 5000, ""]
    bad = some(rng, lambda: {"image": rng.choice(names), "question": "q", "answer": "a"}, 6)
    return Case(lines(rng, folder, bad), {"missing_file": len(bad)})


def paths_that_lead_out(rng, folder):
    (folder.parent / "secret.png").write_bytes(encoded(rng))
    names = ["../secret.png", "a/../../secret.png", "../../../../../../etc/passwd", "./../secret.png"]
    bad = some(rng, lambda: {"image": rng.choice(names), "question": "q", "answer": "a"})
    return Case(lines(rng, folder, bad), {"path_escapes": len(bad)})


def tars_that_lead_out(rng, folder):
    names = ["../../evil", "/etc/evil", "a/../../b", "C:\\evil"]
    rng.shuffle(names)
    images = [encoded(rng) for _ in names]
    tar_of(
        folder / "x.tar",
        [
            (f"{n}.{end}", c)
            for n, i in zip(names, images, strict=True)
            for end, c in (("png", i), ("txt", b"a caption"))
        ],
    )
    with tarfile.open(folder / "x.tar", "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("link.png")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    return Case(len(names), images=images)


def torn_tars(rng, folder):
    images = [encoded(rng, size=(30, 30)) for _ in range(6)]
    tar_of(
        folder / "x.tar",
        [(f"{n}.{end}", c) for n, i in enumerate(images) for end, c in (("png", i), ("txt", b"a caption"))],
    )
    data = (folder / "x.tar").read_bytes()
    whole = rng.randint(0, 5)  # a member of this row is cut
    with tarfile.open(folder / "x.tar") as tar:
        start = tar.getmember(f"{whole}.png").offset_data
    (folder / "x.tar").write_bytes(
        data[: start + rng.randint(1, len(images[whole]) - 1)] if rng.random() < 0.9 else b""
    )
    if not (folder / "x.tar").stat().st_size:
        return Case(1, {"torn_file": 1})
    return Case(whole + 1, {"torn_file": 1}, images=images[:whole])


def broken_members(rng, folder):
    members = [
        ("1.png", encoded(rng)),
        ("1.txt", b"\xff\xfe"),
        ("2.png", encoded(rng)),
        ("2.json", b"{oops"),
        ("3.png", encoded(rng)),
        ("3.json", b"[]"),
    ]
    members += [
        ("4.png", encoded(rng)),
        ("4.png", encoded(rng)),
        ("5.png", encoded(rng)),
        ("5.txt", b"whole"),
        ("6.txt", b"no image"),
    ]
    tar_of(folder / "x.tar", members)
    return Case(
        6,
        {"bad_text": 1, "invalid_json": 1, "wrong_type": 1, "wrong_member": 1, "wrong_columns": 1},
        images=[members[8][1]],
    )


CLASSES = [
    corrupt_pixels,
    truncated_images,
    zero_byte_images,
    decompression_bombs,
    bytes_that_are_no_image,
    odd_colour_modes,
    animations,
    several_images_a_row,
    image_counts_that_differ,
    unicode_text,
    special_tokens_in_text,
    nul_bytes,
    enormous_text,
    text_that_is_not_unicode,
    empty_answers,
    mixed_text_only_rows,
    wrong_columns,
    wrong_types,
    conversations_without_a_turn,
    wrong_roles,
    empty_parquet,
    damaged_parquet,
    invalid_json_lines,
    torn_json_lists,
    missing_files,
    paths_that_lead_out,
    tars_that_lead_out,
    torn_tars,
    broken_members,
]
