"""The time left follows from the pace of the last hundred steps, whatever happened between them."""

import pytest

from smolray.run.rates import ETA_STEPS, seconds_left


def steps_every(seconds, numbers, start=0.0, attempt=1):
    """Step events of one attempt at an even pace."""
    return [
        {"event": "step", "attempt": attempt, "step": number, "time": start + seconds * i, "seconds": seconds}
        for i, number in enumerate(numbers)
    ]


def test_one_slow_step_changes_the_time_left_by_little():
    steps = steps_every(1.0, range(1, 201))
    assert seconds_left(steps, 1000) == 800
    slow = {"event": "step", "attempt": 1, "step": 201, "time": steps[-1]["time"] + 10, "seconds": 10.0}
    assert seconds_left([*steps, slow], 1000) == pytest.approx(799 * 1.09, abs=0.1)


def test_evaluation_and_saving_between_steps_count():
    before = steps_every(1.0, range(1, 52))
    after = steps_every(1.0, range(52, 102), start=before[-1]["time"] + 1.0 + 50.0)
    assert seconds_left([*before, *after], 201) == 100 * 1.5, (
        "100 steps took 100 s, and the evaluation between them 50 s"
    )


def test_what_is_older_than_the_last_hundred_steps_does_not_count():
    slow = steps_every(60.0, range(1, 51))
    fast = steps_every(1.0, range(51, 51 + ETA_STEPS + 1), start=slow[-1]["time"] + 60)
    assert seconds_left([*slow, *fast], fast[-1]["step"] + 10) == 10


def test_the_time_between_two_attempts_does_not_count():
    first = steps_every(1.0, range(1, 31))
    second = steps_every(2.0, range(31, 34), start=first[-1]["time"] + 3600, attempt=2)
    assert seconds_left([*first, *second], 43) == 10 * 2.0
    assert seconds_left([*first, second[0]], 41) == 10 * 2.0, "the first step of an attempt: its own seconds"


def test_the_time_left_is_unknown_without_steps_or_a_total():
    assert seconds_left([], 100) is None
    assert seconds_left(steps_every(1.0, [1]), None) is None
    assert seconds_left([{"step": 1, "time": 0.0}], 100) is None
    assert seconds_left(steps_every(1.0, [100]), 100) == 0
