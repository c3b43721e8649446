"""A place that takes no files is named in one line, with the reason."""

import subprocess

import pytest

from smolray import storage
from tests.commands import smolray


@pytest.fixture
def read_only(tmp_path):
    """A file system that is mounted read-only."""
    folder = tmp_path / "ro"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_folder_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(storage.StorageError, match=r"storage = .*/file/runs cannot be written: Not a directory"):
        storage.require_writable(f"{tmp_path}/file/runs", "storage")


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path):
    storage.require_writable(str(tmp_path), "storage")
    assert not list(tmp_path.iterdir())


def test_every_command_that_writes_says_in_one_line_that_storage_is_read_only(read_only, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "what?", "answer": "it"}\n')
    run = ["name=x", "model.path=tiny", f"storage={read_only}/runs", f"data.train={tmp_path}/rows.jsonl"]
    space = "search.space={optimizer.learning_rate: {uniform: [1e-5, 1e-4]}}"
    for command in (["train", *run], ["tune", *run, space, "search.metric=loss"]):
        done = smolray(*command)
        assert done.exit_code == 2, done.output
        (line,) = done.stderr.splitlines()
        assert line == f"error: storage = {read_only}/runs cannot be written: Read-only file system"
