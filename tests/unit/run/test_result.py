"""A damaged file of a run is one message with its path and the remedy; an undamaged one is read as it is."""

import json

import pytest

from smolray import storage
from smolray.run.folder import RunFolder
from smolray.run.result import RunFileError, read_result
from smolray.run.status import list_runs, run_status

DAMAGED = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"7",
    b'{"status": 3}',
    b"\xff\xfe\x00",
    b"[" * 100_000,
    b'{"status": "finished", "steps"',
]


def test_a_result_is_read_as_it_was_written(tmp_path):
    assert read_result(str(tmp_path)) == {}
    storage.write_bytes(RunFolder(str(tmp_path)).result, json.dumps({"status": "finished", "steps": 3}).encode())
    assert read_result(str(tmp_path)) == {"status": "finished", "steps": 3}


@pytest.mark.parametrize("data", DAMAGED, ids=repr)
def test_a_damaged_result_is_named_with_the_remedy(tmp_path, data):
    run_dir = str(tmp_path / "mine")
    storage.write_bytes(RunFolder(run_dir).result, data)
    with pytest.raises(RunFileError) as told:
        read_result(run_dir)
    assert str(told.value).startswith(f"{run_dir}/result.json is damaged: ") and "\n" not in str(told.value)
    assert f"Delete it, and `smolray resume mine --storage {tmp_path}`" in str(told.value)


def test_a_folder_in_place_of_the_result_is_told(tmp_path):
    (tmp_path / "result.json").mkdir()
    with pytest.raises(RunFileError, match=r"result\.json is damaged"):
        read_result(str(tmp_path))


def write_log(folder, *lines):
    folder.mkdir()
    (folder / "events.jsonl").write_text("".join(f"{line}\n" for line in lines))


def test_lines_that_are_no_events_are_left_out(tmp_path):
    write_log(tmp_path / "r", '{"event": "start", "time": 1, "attempt": 1}', "[1]", "3", '{"evemt": "end"}', "null")
    assert run_status(str(tmp_path / "r"), now=2.0).attempts == 1


def test_a_damaged_log_is_told_and_does_not_hide_other_runs(tmp_path):
    write_log(tmp_path / "bad", '{"event": "start", "tine": 1}')
    write_log(tmp_path / "good", '{"event": "end", "time": 1, "status": "finished"}')
    with pytest.raises(RunFileError, match=r"bad/events\.jsonl .*is damaged: KeyError: 'time'"):
        run_status(str(tmp_path / "bad"))
    found = {status.name: status for status in list_runs(str(tmp_path))}
    assert found["good"].state == "finished" and "is damaged" in found["bad"].error
