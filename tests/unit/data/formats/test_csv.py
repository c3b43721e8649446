"""CSV and TSV files: every row is read as written, or quarantined with its number, however the file is cut."""

import csv
import random

import pytest

from smolray.config import ColumnsConfig, DataConfig
from smolray.data.formats import csv as csv_format
from smolray.data.formats.discover import list_read_tasks, read_rows, resolve
from smolray.data.formats.images import ImageReader, folder_of
from smolray.data.formats.layouts import parse
from smolray.data.formats.source import SourceError
from tests.offline import picture

DATA = DataConfig()


def rows_of(path, task_bytes=2**28):
    return [row for task in list_read_tasks(resolve(str(path), DATA), task_bytes) for row in read_rows(task)]


def records_of(path, task_bytes=2**28):
    """The records of the readable rows; the others as their reasons."""
    return [row.reason or row.record for row in rows_of(path, task_bytes)]


def write(folder, text, name="x.csv"):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / name


def test_rows_with_image_paths_become_samples(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(picture(8, 6))
    text = 'image,question,answer,id\nimages/a.png,"what, exactly?",007,1.50\n,2 + 2?,4,\n'
    task = list_read_tasks(resolve(str(write(tmp_path, text)), DATA))[0]
    images = ImageReader(folder_of(task.uri), task.root, DATA.max_image_pixels)
    (first,), (second,) = (parse(row.record, f"x#{row.row}", DATA, images).samples for row in read_rows(task))

    assert first.images == (picture(8, 6),) and second.images == ()
    assert [m.text for m in first.conversation.messages] == ["what, exactly?", "007"]
    assert (first.conversation.id, second.conversation.id) == ("1.50", "x#1")


def test_columns_may_be_named_in_the_config(tmp_path):
    data = DataConfig(columns=ColumnsConfig(question="q", answer="a"))
    row = rows_of(write(tmp_path, "q\ta\nwhy?\tbecause\n", "x.tsv"))[0]
    (sample,) = parse(row.record, "x#0", data, ImageReader(str(tmp_path), str(tmp_path), 100)).samples
    assert [m.text for m in sample.conversation.messages] == ["why?", "because"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_quoted_fields_hold_delimiters_quotes_and_newlines(tmp_path, end):
    text = end.join(["\ufeffquestion,answer", '"a ""b"", c","two\nlines"', '5" pipe,', '"",""', ""])
    assert records_of(write(tmp_path, text)) == [
        {"question": 'a "b", c', "answer": "two\nlines"},
        {"question": '5" pipe', "answer": None},
        {"question": None, "answer": None},
    ]


def test_blank_lines_and_unnamed_columns_are_left_out(tmp_path):
    text = "\n,question,answer\n\n0,q,a\n  \r\n1,r,b\n\n"
    assert [(r.row, r.record) for r in rows_of(write(tmp_path, text))] == [
        (0, {"question": "q", "answer": "a"}),
        (1, {"question": "r", "answer": "b"}),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"too,many,fields", "invalid_csv"),
        (b"one", "invalid_csv"),
        (b'q,"he said "yes" to it"', "invalid_csv"),
        (b'q,"never closed', "invalid_csv"),
        (b"q,\xff\xfe", "bad_text"),
        (b'"two\nlines\xff",a', "bad_text"),
    ],
)
def test_an_odd_row_is_quarantined_and_the_next_ones_are_read(tmp_path, line, reason):
    path = write(tmp_path, b"question,answer\nq0,a0\n" + line + b'\nq2,a2\n"q3",a3\n')
    rows = rows_of(path)
    assert [r.row for r in rows] == [0, 1, 2, 3]
    assert [r.reason for r in rows] == ["", reason, "", ""] and rows[1].message
    assert rows[3].record == {"question": "q3", "answer": "a3"}


def test_a_file_cut_in_the_middle_of_a_row_is_refused(tmp_path):
    text = "".join(f'q{n},"a {n}\nmore"\n' for n in range(20))
    whole = len("question,answer\n" + text)
    for lost in (3, 8, 14):
        with pytest.raises(SourceError, match=rf"ends in the middle of row (19|20), at byte {whole - lost}"):
            rows_of(write(tmp_path, ("question,answer\n" + text)[: whole - lost]))


def test_a_line_above_the_limit_is_one_quarantined_row(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_format, "MAX_ROW", 50)
    long = "x" * 120
    path = write(tmp_path, f'question,answer\nq0,a0\n{long},a\n"{long}\n{long}",a\nq,a\n')
    assert [r.reason for r in rows_of(path)] == ["", "text_too_long", "text_too_long", "text_too_long", ""]


@pytest.mark.parametrize("seed", range(20))
def test_a_file_cut_anywhere_gives_the_same_rows(tmp_path, seed):
    """Random fields, half of them with quotes and newlines, a few lines damaged: the same rows whatever the cut."""
    rng = random.Random(seed)
    words = ["a", 'say "yes"', "x,y", "two\nlines", "täxt", "", "\r\n", '"']
    path = tmp_path / "x.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator=rng.choice(["\n", "\r\n"]))
        writer.writerow(["question", "answer", "id"])
        for number in range(60):
            writer.writerow([rng.choice(words), rng.choice(words) + rng.choice(words), number])
    with path.open(newline="", encoding="utf-8") as file:
        expected = [{name: value or None for name, value in row.items()} for row in csv.DictReader(file)]
    assert records_of(path) == expected

    damaged = bytearray(path.read_bytes())
    for _ in range(rng.randint(0, 6)):
        damaged[rng.randint(20, len(damaged) - 1)] = rng.choice(b'",\n\xff')
    path.write_bytes(damaged)
    whole = rows_of(path)
    assert [r.row for r in whole] == list(range(len(whole)))
    for task_bytes in (1, 16 * 100, 16 * 1000):
        assert rows_of(path, task_bytes) == whole
    assert len(list_read_tasks(resolve(str(path), DATA), 1)) > 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"question,answer,question\nq,a,b\n", "the header names question more than once; rename one of each"),
        ("question,answer\nq,a\n".encode("utf-16"), "the header is not UTF-8 .*; save the file as UTF-8"),
        (b"question,answer\rq,a\r", "lines end in CR alone; expected LF or CR LF"),
        (b'question,"answer\nq,a\n', "the header cannot be read: a quoted field is not closed"),
    ],
)
def test_a_header_that_cannot_be_read_is_refused(tmp_path, content, message):
    with pytest.raises(SourceError, match=f"x.csv: {message}"):
        rows_of(write(tmp_path, content))


@pytest.mark.parametrize("content", [b"\n", b"question,answer", b"question,answer\n\n"])
def test_a_file_without_rows_has_none(tmp_path, content):
    assert list_read_tasks(resolve(str(write(tmp_path, content)), DATA)) == []


def test_a_replaced_image_next_to_its_csv_makes_another_source(tmp_path):
    write(tmp_path, "image,caption\na.png,a cat\n")
    (tmp_path / "a.png").write_bytes(b"one")
    before = resolve(str(tmp_path), DATA)
    (tmp_path / "a.png").write_bytes(b"another")
    assert resolve(str(tmp_path), DATA).identity != before.identity
