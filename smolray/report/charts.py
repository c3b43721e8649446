"""Line charts as inline SVG: in go series of (x, y) points, out comes markup that needs no script, no font file and no
network.

Colours are CSS classes (`s0`, `s1`, …) of the page, so that light and dark follow the page's style.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 760, 250
LEFT, RIGHT, TOP, BOTTOM = 68, 14, 14, 40
MAX_POINTS = 1200  # a line on a screen shows no more; above it each bucket keeps its lowest and highest point

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line. `faint` draws it thin and pale, behind; `dots` marks each point and says its value on hover."""

    name: str
    points: tuple[Point, ...]
    faint: bool = False
    dots: bool = False


def line_chart(
    title: str,
    series: Sequence[Series],
    y_format: Callable[[float], str] = "{:g}".format,
    marks: Sequence[tuple[float, str]] = (),
    y_limits: tuple[float | None, float | None] = (None, None),
    baseline: tuple[float, str] | None = None,
    x_label: str = "step",
) -> str:
    """A figure with axes, legend, vertical `marks` (x, label) and a dashed horizontal `baseline` (y, label).

    Points that are not finite are left out; without any the figure says so.
    """
    drawn = [Series(s.name, _thin(_finite(s.points)), s.faint, s.dots) for s in series]
    points = [p for s in drawn for p in s.points]
    if not points:
        return f'<figure class="chart"><figcaption>{escape(title)}</figcaption><p class="quiet">Nothing logged yet.</p></figure>'
    ys = [y for _, y in points] + ([baseline[0]] if baseline else [])
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    low, high = (limit if limit is not None else pick(ys) for limit, pick in zip(y_limits, (min, max), strict=True))
    ticks = nice_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    x_span, y_span = (x_high - x_low) or 1.0, (high - low) or 1.0

    def place(x: float, y: float) -> tuple[str, str]:
        across = LEFT + (x - x_low) / x_span * (WIDTH - LEFT - RIGHT) if x_high > x_low else (LEFT + WIDTH - RIGHT) / 2
        return f"{across:.1f}", f"{TOP + (high - y) / y_span * (HEIGHT - TOP - BOTTOM):.1f}"

    body = []
    for tick in ticks:
        _, y = place(x_low, tick)
        body.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        body.append(
            f'<text class="tick" x="{LEFT - 8}" y="{y}" dy="0.32em" text-anchor="end">{escape(y_format(tick))}</text>'
        )
    for tick in nice_ticks(x_low, x_high):
        if x_low <= tick <= x_high:
            x, _ = place(tick, low)
            body.append(f'<text class="tick" x="{x}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{tick:g}</text>')
    body.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{escape(x_label)}</text>')
    for x_mark, label in marks:
        if x_low <= x_mark <= x_high:
            x, _ = place(x_mark, low)
            body.append(
                f'<line class="mark" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"><title>{escape(label)}</title></line>'
            )
    if baseline:
        _, y = place(x_low, baseline[0])
        body.append(f'<line class="baseline" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        body.append(
            f'<text class="tick" x="{WIDTH - RIGHT}" y="{y}" dy="-0.4em" text-anchor="end">{escape(baseline[1])}</text>'
        )
    for index, line in enumerate(drawn):
        spots = [place(x, y) for x, y in line.points]
        style = f"s{index}{' faint' if line.faint else ''}"
        body.append(f'<polyline class="line {style}" points="{" ".join(",".join(spot) for spot in spots)}"/>')
        if line.dots or len(spots) == 1:
            for (x, y), (raw_x, raw_y) in zip(spots, line.points, strict=True):
                body.append(
                    f'<circle class="dot {style}" cx="{x}" cy="{y}" r="3.5">'
                    f"<title>{escape(line.name)}: {escape(y_format(raw_y))} at {escape(x_label)} {raw_x:g}</title></circle>"
                )
    if marks:
        body.append(f'<line class="axis" x1="{LEFT}" x2="{LEFT}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    keys = "".join(
        f'<span class="key s{i}{" faint" if s.faint else ""}">{escape(s.name)}</span>'
        for i, s in enumerate(drawn)
        if s.points
    )
    keys += f'<span class="key restarts">{escape(marks[0][1].split(" ")[0])}</span>' if marks else ""
    legend = f'<div class="legend">{keys}</div>' if len(drawn) > 1 or marks else ""
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{legend}'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">{"".join(body)}</svg></figure>'
    )


def smooth(points: Sequence[Point], span: float | None = None) -> tuple[Point, ...]:
    """Exponential moving average over about `span` points (default: a twentieth of them), unbiased at the start."""
    finite = _finite(points)
    keep = 1 - 2 / (max(span or len(finite) / 20, 3.0) + 1)
    total, weight, smoothed = 0.0, 0.0, []
    for x, y in finite:
        total, weight = keep * total + y, keep * weight + 1
        smoothed.append((x, total / weight))
    return tuple(smoothed)


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) from at or below `low` to at or above `high`."""
    if high - low <= abs(high) * 1e-9:
        pad = abs(high) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def _finite(points: Sequence[Point]) -> tuple[Point, ...]:
    return tuple((float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y))


def _thin(points: tuple[Point, ...]) -> tuple[Point, ...]:
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(2 * len(points) / MAX_POINTS)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        extremes = {min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])}
        kept += sorted(extremes)
    return tuple(kept)
