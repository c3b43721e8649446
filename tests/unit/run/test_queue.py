"""The order of a queue, and that a run which is submitted again has its old place."""

import pytest

from smolray.run.events import EventLog
from smolray.run.lease import owning
from smolray.run.queue import Entry, Line, enter, in_order, leave, read_queue, start


def entry(run, user="ann", priority=0, since=0.0, **more):
    return Entry(run, user, priority, since, 1, **more)


@pytest.mark.parametrize(
    ("entries", "order"),
    [
        ([entry("b", since=2), entry("a", since=1)], "ab"),
        ([entry("a", since=1), entry("b", since=2, priority=1)], "ba"),
        ([entry("a", since=1), entry("b", since=2), entry("c", "bob", since=3)], "acb"),
        ([entry("a", since=1), entry("c", "bob", since=3), entry("r", since=0, turn=5)], "rca"),
        ([entry("a", since=1), entry("l", since=0, lost=True), entry("r", since=0, turn=5, lost=True)], "alr"),
    ],
    ids=["age", "priority", "users in turns", "who trains stands back", "the lost are last"],
)
def test_the_line_is_by_priority_then_fair_then_by_age(entries, order):
    assert "".join(e.run for e in in_order(entries)) == order


def test_a_run_that_is_submitted_again_has_its_old_place(tmp_path):
    """Its driver was lost with the head; meanwhile the line goes on without it."""
    root = str(tmp_path)
    with owning(f"{root}/second", "train"):
        enter(root, "first", "ann", 0, 2)
        enter(root, "second", "ann", 0, 2)
        assert [(e.run, e.lost) for e in read_queue(root)] == [("second", False), ("first", True)]
        assert Line(root, "second").place() == (1, 1, "")
        with owning(f"{root}/first", "train"):
            enter(root, "first", "ann", 0, 2)
            assert [e.run for e in read_queue(root)] == ["first", "second"]
            assert Line(root, "second").place() == (2, 2, "")


def test_until_the_workers_of_a_run_train_nobody_else_has_a_turn(tmp_path):
    root = str(tmp_path)
    with owning(f"{root}/first", "train"), owning(f"{root}/second", "train"):
        start(root, enter(root, "first", "ann", 0, 2))
        enter(root, "second", "ann", 0, 2)
        log = EventLog(f"{root}/first")
        log.write("launch")
        assert Line(root, "second").place() == (1, 1, "first")
        log.write("start")
        assert Line(root, "second").place() == (1, 1, "")


def test_a_run_leaves_and_what_is_no_entry_is_no_run(tmp_path):
    root = str(tmp_path)
    enter(root, "first", "ann", 0, 2)
    (tmp_path / ".queue" / "x.json").write_text("{")
    leave(root, "first")
    leave(root, "first")
    assert read_queue(root) == []
