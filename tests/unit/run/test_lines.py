"""A file of lines keeps what was written once, on a storage that appends and on a full one."""

import pytest

from smolray import storage
from smolray.run.lines import LineFile


def test_lines_are_added_behind_those_that_are_there(tmp_path):
    path = tmp_path / "lines"
    first = LineFile(str(path))
    first.add("a")
    first.flush()
    second = LineFile(str(path))
    second.add("b")
    second.add("c")
    second.flush()
    second.flush()
    assert path.read_text() == "a\nb\nc\n"


def test_a_line_behind_a_torn_one_starts_on_its_own(tmp_path):
    path = tmp_path / "lines"
    path.write_text("a\nhalf of a li")
    file = LineFile(str(path))
    file.add("b")
    file.flush()
    assert path.read_text() == "a\nhalf of a li\nb\n"


def test_lines_that_do_not_fit_are_kept_for_the_next_flush(tmp_path):
    path = tmp_path / "lines"
    file = LineFile(str(path))
    path.symlink_to("/dev/full")
    file.add("a")
    with pytest.raises(storage.StorageFullError):
        file.flush()
    path.unlink()
    file.add("b")
    file.flush()
    assert path.read_text() == "a\nb\n"
