"""Damaged files: each is refused with its name, the place and what is lost, or each lost row is told."""

import gzip
import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smolray.config import DataConfig
from smolray.data.formats import webdataset
from smolray.data.formats.discover import list_read_tasks, read_rows, resolve
from smolray.data.formats.source import SourceError
from tests.fuzz.sources import damaged_source, outcome
from tests.hostile.case import tar_of
from tests.offline import picture

LINES = b"".join(json.dumps({"question": f"q{n:02}", "answer": "a"}).encode() + b"\n" for n in range(50))


def rows_of(path):
    return [row for task in list_read_tasks(resolve(str(path), DataConfig())) for row in read_rows(task)]


def write(folder, name, content):
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


@pytest.fixture
def archive(tmp_path):
    """A tar of 20 rows, as bytes."""
    members = [(f"{n:03}.{end}", c) for n in range(20) for end, c in (("png", picture(8, 6, n)), ("txt", b"a caption"))]
    tar_of(tmp_path / "whole", members)
    content = (tmp_path / "whole").read_bytes()
    (tmp_path / "whole").unlink()
    return content


def start_of(archive, name):
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return tar.getmember(name).offset


@pytest.mark.parametrize("seed", range(60))
def test_a_damaged_source_is_refused_or_each_lost_row_is_told(seed, tmp_path):
    done, rows, task_bytes = damaged_source(seed, tmp_path)
    try:
        found = outcome(tmp_path, task_bytes)
    except SourceError as error:
        assert str(tmp_path) in str(error), done
        return
    assert len(found.kept) <= rows <= len(found.kept) + found.told, done


def test_a_tar_with_a_damaged_header_is_refused_with_its_place(tmp_path, archive):
    at = start_of(archive, "010.png")
    flipped = bytearray(archive)
    flipped[at + 150] ^= 4  # in the checksum
    where = f"x.tar is damaged: behind member '009.txt', at byte {at} of the archive: bad checksum"
    with pytest.raises(SourceError, match=where):
        rows_of(write(tmp_path, "x.tar", flipped))


def test_a_tar_cut_between_two_members_is_refused(tmp_path, archive):
    at = start_of(archive, "010.png")
    with pytest.raises(SourceError, match=f"behind member '009.txt', at byte {at} .* without its end mark"):
        rows_of(write(tmp_path, "x.tar", archive[:at]))


def test_a_tar_cut_inside_a_member_is_refused(tmp_path, archive):
    at = start_of(archive, "010.png")
    with pytest.raises(SourceError, match=f"in member '010.png', at byte {at} of the archive: unexpected end"):
        rows_of(write(tmp_path, "x.tar", archive[: at + 550]))


def test_a_tar_with_a_hole_or_data_behind_its_end_is_refused(tmp_path, archive):
    at = start_of(archive, "010.png")
    hole = archive[:at] + bytes(512) + archive[at + 512 :]
    for content in (hole, archive + archive, archive + b"x"):
        with pytest.raises(SourceError, match="zeros as at the end of an archive, but more data behind them"):
            rows_of(write(tmp_path, "x.tar", content))
    assert len(rows_of(write(tmp_path, "x.tar", archive + bytes(5000)))) == 20


def test_damaged_gzip_is_refused_and_several_streams_are_read(tmp_path, archive):
    for name, content, rows in (("x.tar.gz", archive, 20), ("x.jsonl.gz", LINES, 50)):
        whole, half = gzip.compress(content), len(content) // 2
        wrong = bytearray(whole)
        wrong[-6] ^= 1  # the checksum
        for bad in (whole[:-5], whole[:100], whole + b"trailing bytes", wrong, content):
            with pytest.raises(SourceError, match=rf"{name} is damaged: its (gzip data|name ends in gz)"):
                rows_of(write(tmp_path / name, name, bad))
        for good in (whole, gzip.compress(content[:half]) + gzip.compress(content[half:])):
            assert len(rows_of(write(tmp_path / name, name, good))) == rows


def test_json_lines_cut_in_the_middle_of_a_row_are_refused(tmp_path):
    assert len(rows_of(write(tmp_path, "x.jsonl", LINES[:-1]))) == 50  # without its last line end
    for lost in (2, 9, 20, 30):
        with pytest.raises(
            SourceError, match=f"ends in the middle of row 49, at byte {len(LINES) - lost}; this row and"
        ):
            rows_of(write(tmp_path, "x.jsonl", LINES[:-lost]))


@pytest.mark.parametrize(
    ("name", "content"),
    [("x.jsonl", LINES), ("x.csv", b"a,b\n" + b"1,2\n" * 9), ("x.csv", b"a,b\n" + b'"1","2"\n' * 9)],
)
def test_a_line_end_that_is_damaged_makes_two_bad_rows(tmp_path, name, content):
    whole = len(rows_of(write(tmp_path, name, content)))
    lines = content.splitlines(keepends=True)
    for other in (b"*", b"\x0b", b"\x8a"):
        lines[2:3] = [lines[2][:-1] + other]
        rows = rows_of(write(tmp_path, name, b"".join(lines)))
        assert len(rows) == whole and sum(bool(row.reason) for row in rows) == 2


def test_zeros_and_garbage_inside_a_text_are_refused(tmp_path):
    for name, content in (("x.jsonl", LINES), ("x.csv", b"a,b\n" + b"one,two\n" * 200)):
        for block, what in ((bytes(200), "zero bytes"), (bytes(range(1, 256)), "bytes that are no text")):
            damage = f"{name} is damaged: {what} at byte 5[0-9][0-9], in row .*; the rows that stood there are lost"
            with pytest.raises(SourceError, match=damage):
                rows_of(write(tmp_path / name, name, content[:500] + block + content[700:]))


def test_an_empty_file_is_refused_beside_others(tmp_path):
    write(tmp_path, "a.jsonl", LINES)
    write(tmp_path, "b.jsonl", b"")
    with pytest.raises(SourceError, match=r"b\.jsonl is damaged: it has no bytes; its rows are lost"):
        rows_of(tmp_path)


def test_damaged_pages_of_parquet_lose_no_row_untold(tmp_path):
    table = pa.table({"question": [f"q{n}" for n in range(100)], "answer": ["a"] * 100})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=10, compression="none", use_dictionary=False)
    content = bytearray((tmp_path / "x.parquet").read_bytes())
    at = content.index(b"q55")
    content[at - 60 : at] = bytes(60)  # the header of a page
    rows = rows_of(write(tmp_path, "x.parquet", content))
    lost = [row for row in rows if row.reason]
    assert len(rows) == 100 and {row.reason for row in lost} == {"torn_file"} and len(lost) >= 10


def test_a_key_of_too_many_or_too_large_members_is_one_bad_row(tmp_path, monkeypatch):
    monkeypatch.setattr(webdataset, "MAX_MEMBERS", 5)
    monkeypatch.setattr(webdataset, "MAX_ROW", 10_000)
    many = [(f"many.{n}.txt", b"x") for n in range(9)]
    large = [(f"large.{n}.txt", bytes(4000)) for n in range(3)]
    tar_of(tmp_path / "x.tar", [*many, ("good.txt", b"x"), *large, ("good2.txt", b"x")])
    rows = rows_of(tmp_path)
    assert [row.reason for row in rows] == ["wrong_member", "", "wrong_member", ""]
    assert "more than 5 members" in rows[0].message and "the limit is 10000" in rows[2].message
