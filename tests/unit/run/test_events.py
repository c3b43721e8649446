"""The log survives what processes do to it, and tells the history that the newest weights have lived."""

import json
import time

import pytest

from smolray import storage
from smolray.run.events import EventLog, read_events, surviving
from smolray.run.folder import EVENTS
from smolray.run.progress import event_line


def steps(events):
    return [e["step"] for e in events if e["event"] == "step"]


def test_a_resume_discards_later_steps(tmp_path):
    first = EventLog(str(tmp_path))
    first.write("start", workers=2)
    for step in (10, 20, 30):
        first.write("step", step=step, loss=step)
    second = EventLog(str(tmp_path))
    second.write("start", workers=1)
    second.write("resume", step=20)
    second.write("step", step=30, loss=-1)
    written = read_events(str(tmp_path))
    assert steps(written) == [10, 20, 30, 30]
    kept = surviving(written)
    assert steps(kept) == [10, 20, 30]
    assert kept[-1]["loss"] == -1
    assert [e["workers"] for e in kept if e["event"] == "start"] == [2, 1], (
        "starts stay: they are attempts, not progress"
    )
    assert [e["attempt"] for e in written if e["event"] == "start"] == [1, 2]


def test_a_resume_before_an_earlier_resume_discards_both(tmp_path):
    log = EventLog(str(tmp_path))
    for kind, step in [
        ("step", 10),
        ("step", 20),
        ("resume", 10),
        ("step", 20),
        ("step", 30),
        ("resume", 5),
        ("step", 6),
    ]:
        log.write(kind, step=step)
    assert steps(surviving(read_events(str(tmp_path)))) == [6]


def test_a_torn_last_line_is_left_out(tmp_path):
    log = EventLog(str(tmp_path))
    log.write("start", workers=1)
    log.write("step", step=1)
    file = tmp_path / EVENTS
    file.write_bytes(file.read_bytes()[:-9])
    assert [e["event"] for e in read_events(str(tmp_path))] == ["start"]


def test_the_first_event_after_a_torn_line_is_not_lost(tmp_path):
    EventLog(str(tmp_path)).write("step", step=1)
    file = tmp_path / EVENTS
    file.write_bytes(file.read_bytes() + b'{"event": "step", "st')
    EventLog(str(tmp_path)).write("start", workers=3)
    assert [e["event"] for e in read_events(str(tmp_path))] == ["step", "start"]


def test_a_folder_without_a_log_has_no_events(tmp_path):
    assert read_events(str(tmp_path / "absent")) == []


def test_events_carry_time_and_attempt_and_are_lines_of_json(tmp_path):
    EventLog(str(tmp_path)).write("skipped", what="checkpoints/step-1", why="hash differs — ü")
    (line,) = (tmp_path / EVENTS).read_text().splitlines()
    event = json.loads(line)
    assert event["attempt"] == 1
    assert event["time"] == pytest.approx(time.time(), abs=60)
    assert event["why"] == "hash differs — ü"


def test_events_wait_for_room_on_a_full_storage(tmp_path):
    log = EventLog(str(tmp_path))
    log.write("start", workers=1)
    path = tmp_path / "events.jsonl"
    path.rename(tmp_path / "aside")
    path.symlink_to("/dev/full")
    log.write("step", step=1)
    with pytest.raises(storage.StorageFullError, match="no room for"):
        log.flush()
    (tmp_path / "aside").replace(path)
    log.write("step", step=2)
    assert [e.get("step") for e in read_events(str(tmp_path))] == [None, 1, 2]


def test_an_older_log_is_read_with_the_names_of_today(tmp_path):
    (tmp_path / EVENTS).write_text(json.dumps({"event": "deal", "shares": [3, 2], "tokens_per_second": [3, 2]}) + "\n")
    (event,) = read_events(str(tmp_path))
    assert event["event"] == "balance"
    assert event_line(event) == "balance 3 + 2 micro-batches a step for workers of 3, 2 tokens/s"
