"""The surviving history of consumed samples, folded from the files of several attempts and workers."""

import json

from smolray.run.events import EventLog, read_events, surviving
from smolray.train.audit import consumed


def write(run, attempt, rank, *lines):
    folder = run / "audit"
    folder.mkdir(exist_ok=True)
    records = [{"step": step, "epoch": 0, "micro_batch": step - 1, "ids": ids} for step, ids in lines]
    (folder / f"attempt-{attempt:05d}-rank-{rank:04d}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def restart(run, step):
    log = EventLog(str(run))
    log.write("start", workers=2)
    if log.attempt > 1:
        log.write("resume", step=step, position=(0, step))


def test_a_resume_discards_what_was_consumed_after_its_checkpoint(tmp_path):
    restart(tmp_path, 0)
    write(tmp_path, 1, 0, (1, ["a"]), (2, ["c"]), (3, ["e"]))
    write(tmp_path, 1, 1, (1, ["b"]), (2, ["d"]))
    restart(tmp_path, 2)
    write(tmp_path, 2, 0, (3, ["e", "f"]), (4, ["g"]))
    assert consumed(str(tmp_path)) == {0: [(1, "a"), (1, "b"), (2, "c"), (2, "d"), (3, "e"), (3, "f"), (4, "g")]}


def test_an_attempt_without_a_checkpoint_is_discarded(tmp_path):
    restart(tmp_path, 0)
    EventLog(str(tmp_path)).write("step", step=1, loss=1.0)
    write(tmp_path, 1, 0, (1, ["a"]))
    restart(tmp_path, 0)
    write(tmp_path, 2, 0, (1, ["a"]), (2, ["b"]))
    assert consumed(str(tmp_path)) == {0: [(1, "a"), (2, "b")]}
    assert [e["event"] for e in surviving(read_events(str(tmp_path)))] == ["start", "start", "resume"]


def test_an_older_attempt_ends_at_the_earliest_later_resume(tmp_path):
    restart(tmp_path, 0)
    write(tmp_path, 1, 0, (1, ["a"]), (2, ["b"]), (3, ["c"]))
    restart(tmp_path, 2)
    write(tmp_path, 2, 0, (3, ["c"]))
    restart(tmp_path, 1)
    write(tmp_path, 3, 0, (2, ["b"]), (3, ["c"]))
    assert consumed(str(tmp_path)) == {0: [(1, "a"), (2, "b"), (3, "c")]}
