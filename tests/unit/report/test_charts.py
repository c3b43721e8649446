"""A chart draws its points where they belong, in a size that any screen shows."""

import itertools
import math
import re

import pytest

from smolray.report.charts import MAX_POINTS, SPAN, Series, line_chart, smooth

NUMBER = r"(-?[\d.]+)%"


def lines_of(chart):
    """The points of each line: x to the right and y upwards, 0..1."""
    found = re.findall(r'<polyline [^>]*points="([^"]*)"', chart)
    spots = [[tuple(map(float, spot.split(","))) for spot in line.split()] for line in found]
    return [[(x / SPAN, 1 - y / SPAN) for x, y in line] for line in spots]


def y_ticks(chart):
    """Label -> height, 0..1."""
    found = re.findall(rf'x="0" y="{NUMBER}"[^>]*>([^<]*)</text>', chart)
    return {label: 1 - float(y) / 100 for y, label in found}


def test_points_and_ticks_share_one_scale():
    chart = line_chart("t", [Series("s", ((0, 0.0), (5, 5.0), (10, 10.0)))])
    assert lines_of(chart) == [[(0, 0), (0.5, 0.5), (1, 1)]]
    assert y_ticks(chart) == pytest.approx({"0": 0, "2": 0.2, "4": 0.4, "6": 0.6, "8": 0.8, "10": 1})


def test_on_a_log_scale_equal_factors_are_equally_far_apart():
    chart = line_chart("t", [Series("s", ((0, 0.01), (1, 0.1), (2, 1.0), (3, 10.0)))], log=True)
    heights = [y for _, y in lines_of(chart)[0]]
    steps = [b - a for a, b in itertools.pairwise(heights)]
    assert steps == pytest.approx([steps[0]] * 3, abs=1e-3) and steps[0] > 0.25
    assert y_ticks(chart) == pytest.approx(dict(zip(("0.01", "0.1", "1", "10"), heights, strict=True)), abs=1e-3)
    assert "log scale" in chart


@pytest.mark.parametrize("values", [(0.0, 1.0, 100.0), (-1.0, 1.0, 100.0), (1.0, 1.1, 1.2), (2.0, 2.0, 2.0)])
def test_without_a_log_scale_to_draw_the_chart_is_linear(values):
    series = [Series("s", tuple(enumerate(values)))]
    assert line_chart("t", series, log=True) == line_chart("t", series)


def test_a_chart_thins_long_lines_and_keeps_their_extremes():
    points = tuple((float(i), 0.5) for i in range(50_000))
    spike = (*points[:777], (777.0, 9.0), *points[778:])
    (drawn,) = lines_of(line_chart("t", [Series("s", spike)]))
    assert 2 <= len(drawn) <= MAX_POINTS
    heights = sorted(y for _, y in drawn)
    assert heights[-1] > heights[-2] + 0.5, "the spike stands alone, near the top"


def test_a_smoothed_line_has_the_colour_of_its_points():
    points = ((0, 1.0), (1, 2.0))
    chart = line_chart("t", [Series("raw", points, colour=0, faint=True), Series("smooth", points, colour=0)])
    assert re.findall(r'class="line ([^"]*)"', chart) == ["c0 faint", "c0"]
    chart = line_chart("t", [Series("a", points), Series("rest", points, faint=True), Series("b", points)])
    assert re.findall(r'class="line ([^"]*)"', chart) == ["c0", "grey faint", "c1"]
    assert re.findall(r'class="key[^>]*>([^<]*)<', chart) == ["a", "b"], "grey lines are named on hover"


def test_only_restarts_inside_the_chart_are_marked():
    chart = line_chart("t", [Series("s", ((10, 1.0), (20, 2.0)))], restarts=[5, 15, 25])
    assert re.findall(r"<title>(restart[^<]*)</title>", chart) == ["restart from step 15"]


def test_a_chart_without_finite_points_says_so():
    assert "Nothing logged yet." in line_chart("t", [Series("s", ((1, math.nan), (2, math.inf)))])


def test_smoothing_keeps_a_constant_and_calms_noise():
    assert {round(y, 9) for _, y in smooth([(i, 2.0) for i in range(50)])} == {2.0}
    noisy = smooth([(i, i % 2) for i in range(200)])
    assert all(0.4 < y < 0.6 for _, y in noisy[50:])
