"""Files that are empty, torn or damaged, and paths that lead nowhere or out of the source."""

import json
import os
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq

from tests.hostile.case import Case, encoded, good, lines, mixed, some, tar_of


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
    return Case(9, error="x.json(: there is more after the end of the JSON list| is not a whole JSON list: at byte)")


def missing_files(rng, folder):
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    names = ["gone.png", "a/b/gone.png", "folder.png", "pipe.png", "https://x.org/a.png", "x" * 5000]
    bad = some(rng, lambda: {"image": rng.choice(names), "question": "q", "answer": "a"}, 6)
    return Case(lines(rng, folder, bad), {"missing_file": len(bad)})


def paths_that_lead_out(rng, folder):
    (folder.parent / "secret.png").write_bytes(encoded(rng))
    names = [
        "/dev/zero",
        str(folder.parent / "secret.png"),
        "../secret.png",
        "a/../../secret.png",
        "../../../../../../etc/passwd",
        "./../secret.png",
    ]
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
    return Case(6, error="x.tar is damaged: (it has no bytes|in member '.+', at byte )")


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


def invalid_csv_rows(rng, folder):
    kinds = [b"a,b,c,d", b"alone", b'q,"never closed', b'q,"he said "no" to it"', b'"q"x,a', b"1,2,3,4,5"]
    bad = some(rng, lambda: rng.choice(kinds), 5)
    rows = [b",q,a"] * rng.randint(2, 5) + [b',"two\nlines","a ""b"", c"'] + bad
    rng.shuffle(rows)
    (folder / "x.csv").write_bytes(b"\n".join([b"image,question,answer", *rows, b""]))
    return Case(len(rows), {"invalid_csv": len(bad)}, texts=["two\nlines", 'a "b", c'])
