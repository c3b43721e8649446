"""Parallel coordinates as inline SVG: an axis for each setting and one for the metric, a line for each trial.

In: trials. Out: markup that needs no script.
"""

import json
import math
from collections.abc import Sequence
from html import escape
from typing import Any

from smolray.tune.log import TrialRecord
from smolray.tune.space import Domain, Space

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1000, 300, 60, 60, 20, 34


def parallel_coordinates(trials: Sequence[TrialRecord], space: Space, metric: str) -> str:
    """A figure; the better a trial, the stronger its line, the best in a colour of its own.

    Trials without a value are left out.
    """
    valued = sorted(
        ((v, t) for t in trials if (v := t.value(metric)) is not None),
        key=lambda p: (-p[0] if metric == "loss" else p[0], -p[1].number),
    )
    if not valued:
        return ""
    values = [value for value, _ in valued]
    low, high = min(values), max(values)
    axes = [(key, domain) for key, domain in space.items() if all(key in t.settings for _, t in valued)]
    step = (WIDTH - LEFT - RIGHT) / max(1, len(axes))

    def at(share: float) -> float:
        return TOP + (1 - share) * (HEIGHT - TOP - BOTTOM)

    body = []
    for number, (key, domain) in enumerate(axes):
        x = LEFT + number * step
        body.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        body.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - (14 if number % 2 else 2)}" text-anchor="middle">{escape(key.rsplit(".", 1)[-1])}</text>'
        )
        body += [_tick(x, at(_share(domain, value)), _shown(value)) for value in domain.extremes]
    x = LEFT + len(axes) * step
    body.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    body.append(
        f'<text class="tick" x="{x:.1f}" y="{HEIGHT - (14 if len(axes) % 2 else 2)}" text-anchor="middle">{escape(metric)}</text>'
    )
    body += [_tick(x, at(share), f"{value:.4g}") for share, value in {(0.0, low), (1.0, high)}]
    for rank, (value, trial) in enumerate(valued):
        spots = [(LEFT + n * step, at(_share(domain, trial.settings[key]))) for n, (key, domain) in enumerate(axes)]
        spots.append((x, at((value - low) / (high - low) if high > low else 0.5)))
        best = rank == len(valued) - 1
        strength = 1.0 if best else 0.15 + 0.55 * rank / len(valued)
        points = " ".join(f"{px:.1f},{py:.1f}" for px, py in spots)
        told = f"trial {trial.number}: {metric} {value:.4g}; " + ", ".join(
            f"{k}={_shown(v)}" for k, v in trial.settings.items()
        )
        style = f'class="line {"s1" if best else "s0"}" style="opacity:{strength:.2f}"'
        body.append(f'<polyline {style} points="{points}"><title>{escape(told)}</title></polyline>')
    return (
        f'<figure class="chart"><figcaption>Settings and {escape(metric)} of each trial</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="parallel coordinates">{"".join(body)}</svg></figure>'
    )


def _share(domain: Domain, value: Any) -> float:
    """Where a value stands between the ends of its axis, 0..1."""
    if domain.values:
        return (
            domain.values.index(value) / (len(domain.values) - 1)
            if value in domain.values and len(domain.values) > 1
            else 0.5
        )
    if domain.kind == "loguniform":
        return (math.log(value) - math.log(domain.low)) / (math.log(domain.high) - math.log(domain.low))
    return (value - domain.low) / (domain.high - domain.low)


def _tick(x: float, y: float, text: str) -> str:
    return f'<text class="tick" x="{x + 5:.1f}" y="{y:.1f}" dy="0.32em">{escape(text)}</text>'


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
