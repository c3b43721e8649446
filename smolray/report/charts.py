"""Line charts as inline SVG, which needs no script, no font file and no network.

In: series of (x, y) points. Out: markup for a page.

Places are percentages of the chart, and lines keep their width when it is stretched. So a chart fills any width, with
text of one size. Colours are CSS classes (`c0`, `c1`, …), so they follow the light or dark style of the page.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from markupsafe import Markup

from smolray.report.axis import Axis, linear_axis, log_axis, tight_axis
from smolray.report.page import render

COLOURS = 6
MAX_POINTS = 1200  # a screen shows no more; of more points each bucket keeps its lowest and its highest
SPAN = 1000  # lines are drawn in a square of this size, and the page stretches it

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line.

    `colour`: its number; default: the next one, grey if `faint`. `faint` draws the line thin and pale, behind the
    others. `dots` marks each point and shows its value on hover. `joined`: with a line between the points.
    """

    name: str
    points: tuple[Point, ...]
    colour: int | None = None
    faint: bool = False
    dots: bool = False
    joined: bool = True


class Dot(NamedTuple):
    """A point with the text that is shown on hover."""

    x: str
    y: str
    text: str


class Line(NamedTuple):
    """A series as the template draws it; `points` as SVG writes them, empty for dots alone."""

    name: str
    style: str
    points: str
    dots: list[Dot]
    in_legend: bool


def line_chart(
    title: str,
    series: Sequence[Series],
    y_format: Callable[[float], str] = "{:g}".format,
    restarts: Sequence[float] = (),
    y_limits: tuple[float | None, float | None] = (None, None),
    baseline: tuple[float, str] | None = None,
    x_label: str = "step",
    log: bool = False,
) -> Markup:
    """A figure with axes and a legend.

    `restarts`: x of vertical marks. `baseline`: (y, label) of a dashed horizontal line. `log`: a logarithmic y axis
    where all values are above 0; `y_limits` then have no effect. Points that are not finite are left out; without any
    point the figure says so.
    """
    drawn = [replace(one, points=_thin(_finite(one.points))) for one in series]
    points = [point for one in drawn for point in one.points]
    if not points:
        return render("no_chart.html", title=title)

    x_axis = tight_axis([x for x, _ in points])
    ys = [y for _, y in points] + ([baseline[0]] if baseline else [])
    y_axis = log_axis(ys) if log else linear_axis(ys, y_limits)

    lines = _lines(drawn, x_axis, y_axis, lambda x, y: f"{y_format(y)} at {x_label} {x:g}")
    marks = [(across(x_axis, x), f"restart from step {x:g}") for x in restarts if x_axis.low <= x <= x_axis.high]
    return render(
        "line_chart.html",
        title=title,
        log=y_axis.log,
        legend=[line for line in lines if line.in_legend] if len(lines) > 1 or marks else [],
        x_label=x_label,
        x_ticks=[(across(x_axis, tick), f"{tick:g}") for tick in x_axis.ticks],
        y_ticks=[(down(y_axis, tick), y_format(tick)) for tick in y_axis.ticks],
        restarts=marks,
        baseline=(down(y_axis, baseline[0]), baseline[1]) if baseline else None,
        lines=lines,
        span=SPAN,
    )


def across(axis: Axis, value: float) -> str:
    """Place of a value from the left, in percent of the chart."""
    return f"{100 * axis.share(value):.2f}%"


def down(axis: Axis, value: float) -> str:
    """Place of a value from the top, in percent of the chart."""
    return f"{100 * (1 - axis.share(value)):.2f}%"


def polyline(shares: Sequence[Point]) -> str:
    """The `points` of an SVG polyline: each share is (from the left, from the bottom), 0..1."""
    return " ".join(f"{SPAN * x:.1f},{SPAN * (1 - y):.1f}" for x, y in shares)


def smooth(points: Sequence[Point], span: float | None = None) -> tuple[Point, ...]:
    """Exponential moving average over about `span` points (default: a twentieth of them), unbiased at the start."""
    finite = _finite(points)
    keep = 1 - 2 / (max(span or len(finite) / 20, 3.0) + 1)
    total, weight, smoothed = 0.0, 0.0, []
    for x, y in finite:
        total, weight = keep * total + y, keep * weight + 1
        smoothed.append((x, total / weight))
    return tuple(smoothed)


def _lines(series: Sequence[Series], x_axis: Axis, y_axis: Axis, describe: Callable[[float, float], str]) -> list[Line]:
    lines: list[Line] = []
    unused = iter(range(len(series)))
    for one in series:
        grey = one.faint and one.colour is None
        number = one.colour if one.colour is not None else None if grey else next(unused)
        style = "grey" if number is None else f"c{number % COLOURS}"

        shares = [(x_axis.share(x), y_axis.share(y)) for x, y in one.points]
        dots = [
            Dot(across(x_axis, x), down(y_axis, y), f"{one.name}: {describe(x, y)}")
            for x, y in (one.points if one.dots or len(one.points) == 1 else ())
        ]
        lines.append(
            Line(
                one.name,
                f"{style} faint" if one.faint else style,
                polyline(shares) if one.joined else "",
                dots,
                in_legend=bool(one.points) and not grey,
            )
        )
    return lines


def _finite(points: Sequence[Point]) -> tuple[Point, ...]:
    return tuple((float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y))


def _thin(points: tuple[Point, ...]) -> tuple[Point, ...]:
    if len(points) <= MAX_POINTS:
        return points

    size = math.ceil(2 * len(points) / MAX_POINTS)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        kept += sorted({min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])})
    return tuple(kept)
