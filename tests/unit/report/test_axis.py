"""The numbers on an axis are round, few, and fit the data."""

import pytest

from smolray.report.axis import log_axis, log_ticks, nice_ticks, tight_axis


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.3, 0.3), (-5, 12345), (1e-9, 2e-9), (0, 0), (1e12, 1e12 + 5)])
def test_ticks_enclose_the_data_and_are_few(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high
    assert 2 <= len(ticks) <= 9
    assert ticks == sorted(set(ticks))


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.03, 4, [0.05, 0.1, 0.2, 0.5, 1, 2]),
        (0.05, 2, [0.05, 0.1, 0.2, 0.5, 1, 2]),
        (0.009, 11, [0.01, 0.1, 1, 10]),
        (1e-6, 1e3, [1e-6, 1e-4, 1e-2, 1, 100]),
        (0.019, 5.1, [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5]),
        (1.5, 5.5, [2, 3, 4, 5]),
        (1.1, 1.9, []),
    ],
)
def test_log_ticks_are_powers_of_ten_or_1_2_and_5_times_those(low, high, ticks):
    assert log_ticks(low, high) == ticks


def test_a_log_axis_leaves_a_margin_around_the_data():
    axis = log_axis([0.1, 10])
    assert axis.log and 0.02 < axis.share(0.1) < 0.05 and axis.share(1) == pytest.approx(0.5)


def test_the_ticks_of_a_tight_axis_lie_inside_the_data():
    axis = tight_axis([3, 97])
    assert (axis.low, axis.high, axis.ticks) == (3, 97, (20, 40, 60, 80))
    assert tight_axis([7, 7]).share(7) == 0.5
