"""Parallel coordinates as inline SVG: an axis for each setting and one for the metric, a line for each trial.

In: trials. Out: markup for a page.
"""

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from smolray.report.charts import SPAN, polyline
from smolray.report.page import render
from smolray.tune.domain import Domain
from smolray.tune.log import TrialRecord
from smolray.tune.space import Space

FAINTEST, STRONGEST = 0.15, 0.7  # opacity of the worst trial and of the one after the best


class CoordinateAxis(NamedTuple):
    """A vertical axis: its place from the left, and (place from the top, label) of its ticks."""

    name: str
    x: str
    ticks: list[tuple[str, str]]


class TrialLine(NamedTuple):
    """The line of a trial; `text` is shown on hover."""

    points: str
    style: str
    opacity: str
    text: str


def parallel_coordinates(trials: Sequence[TrialRecord], space: Space, metric: str) -> Markup:
    """A figure: the better a trial, the stronger its line; the best has its own colour.

    Trials without a value are left out; without any there is no figure.
    """
    valued = sorted(
        ((v, t) for t in trials if (v := t.value(metric)) is not None),
        key=lambda p: (-p[0] if metric == "loss" else p[0], -p[1].number),
    )
    if not valued:
        return Markup()

    low, high = min(v for v, _ in valued), max(v for v, _ in valued)
    drawn = {key: domain for key, domain in space.items() if all(key in t.settings for _, t in valued)}
    axes = [
        _axis(key.rsplit(".", 1)[-1], n / len(drawn), [(_share(domain, v), _shown(v)) for v in domain.extremes])
        for n, (key, domain) in enumerate(drawn.items())
    ]
    axes.append(_axis(metric, 1.0, sorted({(0.0, f"{low:.4g}"), (1.0, f"{high:.4g}")})))

    lines = []
    for rank, (value, trial) in enumerate(valued):
        best = rank == len(valued) - 1
        heights = [_share(domain, trial.settings[key]) for key, domain in drawn.items()]
        heights.append((value - low) / (high - low) if high > low else 0.5)
        places = [(n / max(1, len(drawn)), height) for n, height in enumerate(heights)]
        settings = ", ".join(f"{key}={_shown(setting)}" for key, setting in trial.settings.items())
        lines.append(
            TrialLine(
                polyline(places),
                "c1 best" if best else "c0",
                "1" if best else f"{FAINTEST + (STRONGEST - FAINTEST) * rank / len(valued):.2f}",
                f"trial {trial.number}: {metric} {value:.4g}; {settings}",
            )
        )
    return render("parallel_coordinates.html", "smolray.tune", metric=metric, axes=axes, lines=lines, span=SPAN)


def _axis(name: str, share: float, ticks: Sequence[tuple[float, str]]) -> CoordinateAxis:
    return CoordinateAxis(name, f"{100 * share:.2f}%", [(f"{100 * (1 - at):.2f}%", label) for at, label in ticks])


def _share(domain: Domain, value: Any) -> float:
    """The place of a value between the ends of its axis, 0..1."""
    if domain.values:
        known = value in domain.values and len(domain.values) > 1
        return domain.values.index(value) / (len(domain.values) - 1) if known else 0.5
    if domain.kind == "loguniform":
        return math.log(value / domain.low) / math.log(domain.high / domain.low)
    return (value - domain.low) / (domain.high - domain.low)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return value if isinstance(value, str) else json.dumps(value)
