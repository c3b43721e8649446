"""A log in parts: each line once and in order, whoever writes, merges, dies or reads at the same time."""

import pytest

from smolray import storage
from smolray.run import parts
from smolray.run.parts import LineParts, PartsReader, list_parts


def write(log, *lines):
    for line in lines:
        log.add(line)
    log.flush()


def read(folder):
    return [line.decode() for _, line in PartsReader(str(folder)).new()]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_lines_are_read_in_their_order_whatever_was_merged(tmp_path):
    log, lines = LineParts(str(tmp_path), "attempt-00001"), [str(n) for n in range(100)]
    for n in range(0, 100, 2):
        write(log, *lines[n : n + 2])
        if n % 30 == 0:
            log.merge()
        assert read(tmp_path) == lines[: n + 2]
    assert len(names(tmp_path)) < 30


def test_a_file_once_written_is_never_written_again(tmp_path):
    log, seen = LineParts(str(tmp_path), "attempt-00001"), {}
    for n in range(3 * parts.MIN_PARTS + 1):
        write(log, str(n))
        log.merge()
        for path in tmp_path.iterdir():
            about = (path.stat().st_ino, path.stat().st_mtime_ns)
            assert seen.setdefault(path.name, about) == about
    assert len(names(tmp_path)) == 4, "three segments and a part"


def test_parts_become_a_segment_also_without_checkpoints(tmp_path):
    log = LineParts(str(tmp_path), "attempt-00001")
    for n in range(parts.MAX_PARTS + 1):
        write(log, str(n))
    assert len(names(tmp_path)) == 2 and read(tmp_path) == [str(n) for n in range(parts.MAX_PARTS + 1)]


def test_a_writer_that_died_while_it_merged_leaves_each_line_once(tmp_path):
    log = LineParts(str(tmp_path), "attempt-00001")
    for n in range(parts.MIN_PARTS):
        write(log, str(n))
    kept = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    log.merge()
    for name, data in kept.items():  # as if it had not come to delete them
        (tmp_path / name).write_bytes(data)
    assert len(names(tmp_path)) == parts.MIN_PARTS + 1
    assert read(tmp_path) == [str(n) for n in range(parts.MIN_PARTS)]


def test_a_write_that_failed_and_yet_arrived_gives_each_line_once(tmp_path):
    log = LineParts(str(tmp_path), "attempt-00001")
    write(log, "a")
    arrived = names(tmp_path)[0].replace("000000001-000000001", "000000002-000000002")
    (tmp_path / arrived).write_text("b\n")  # the answer was lost: the writer keeps the line
    tail = PartsReader(str(tmp_path))
    assert len(tail.new()) == 2
    write(log, "b", "c")
    assert read(tmp_path) == ["a", "b", "c"] and [line for _, line in tail.new()] == [b"c"]


def test_a_late_writer_of_an_older_stream_neither_damages_nor_stands_between(tmp_path):
    old = LineParts(str(tmp_path), "attempt-00001")
    write(old, "old 1", "old 2")
    new = LineParts(str(tmp_path), "attempt-00002", first=3)
    write(new, "new 3")
    for n in range(3, 3 + parts.MIN_PARTS):
        write(old, f"old {n}")
    old.merge()
    write(new, "new 4")
    assert read(tmp_path) == [f"old {n}" for n in range(1, 3 + parts.MIN_PARTS)] + ["new 3", "new 4"]


def test_two_writers_of_one_stream_stand_by_number_also_when_one_has_merged(tmp_path):
    worker, driver = LineParts(str(tmp_path), "attempt-00001"), LineParts(str(tmp_path), "attempt-00001", first=2)
    for n in range(1, parts.MIN_PARTS + 1):
        write(worker, f"worker {n}")
    write(driver, "driver")
    before = read(tmp_path)
    worker.merge()
    assert len(names(tmp_path)) == 2 and read(tmp_path) == before
    assert before.index("driver") in (1, 2)


def test_a_reader_reads_only_what_is_new(tmp_path, monkeypatch):
    log, tail = LineParts(str(tmp_path), "attempt-00001"), PartsReader(str(tmp_path))
    asked, real = [], storage.read_files
    monkeypatch.setattr(storage, "read_files", lambda folder, found: asked.append(len(found)) or real(folder, found))
    for n in range(parts.MIN_PARTS):
        write(log, str(n))
    assert len(tail.new()) == parts.MIN_PARTS and tail.new() == []
    log.merge()
    assert tail.new() == [], "a segment of known lines is nothing new"
    write(log, "x")
    assert tail.new() == [("attempt-00001", b"x")] and asked == [parts.MIN_PARTS, 0, 0, 1]
    assert tail.last == parts.MIN_PARTS + 1


def test_a_reader_looks_again_where_parts_are_merged_under_its_hands(tmp_path, monkeypatch):
    log = LineParts(str(tmp_path), "attempt-00001")
    for n in range(parts.MIN_PARTS):
        write(log, str(n))
    listed = list_parts(str(tmp_path))
    log.merge()
    answers, real = [listed], parts.list_parts
    monkeypatch.setattr(parts, "list_parts", lambda folder: answers.pop() if answers else real(folder))
    assert read(tmp_path) == [str(n) for n in range(parts.MIN_PARTS)]


def test_files_of_other_names_are_not_read(tmp_path):
    write(LineParts(str(tmp_path), "attempt-00001"), "a")
    (tmp_path / "attempt-00001-000000002-000000002.jsonl").write_text("no writer\n")
    (tmp_path / "notes.txt").write_text("mine\n")
    assert read(tmp_path) == ["a"]


def test_a_folder_that_is_not_there_has_no_lines(tmp_path):
    assert read(tmp_path / "absent") == []


def test_lines_that_could_not_be_written_are_kept(tmp_path):
    log = LineParts(str(tmp_path / "in a file" / "folder"), "attempt-00001")
    (tmp_path / "in a file").write_text("")
    log.add("a")
    with pytest.raises(storage.StorageError):
        log.flush()
    (tmp_path / "in a file").unlink()
    write(log, "b")
    assert read(tmp_path / "in a file" / "folder") == ["a", "b"]
