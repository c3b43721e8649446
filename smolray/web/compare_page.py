"""The page Compare: two runs, or two evaluations of one, question by question.

In: two runs and a metric. Out: the page, with the interval of the difference.
"""

from typing import Any, NamedTuple

from fastapi.responses import Response

from smolray.config import METRICS
from smolray.evaluate.bootstrap import MetricError
from smolray.evaluate.compare import Comparison, compare_runs
from smolray.evaluate.measure import interval, shown
from smolray.run.predictions import prediction_steps
from smolray.web.files import run_folder
from smolray.web.site import Ask, page

MOST_CHANGES = 50


class ChangeRow(NamedTuple):
    """One question type: both values, and the difference with its interval."""

    kind: str
    questions: str
    a: str
    b: str
    difference: str
    interval: str
    gained: str
    lost: str
    p_value: str
    verdict: str


def show(ask: Ask) -> Response:
    """GET /compare?a=RUN&b=RUN&metric=exact_match."""
    a, b, metric = ask.given("a"), ask.given("b"), ask.given("metric", "exact_match")
    found, fault = None, ""
    if a and b:
        try:
            found = _compared(ask, a, b, metric)
        except MetricError as error:
            fault = str(error)
    names = [run.name for run in ask.site.runs.look() if run.accuracy is not None]
    return page(
        ask,
        "compare.html",
        "Compare",
        names=sorted({*names, *filter(None, (a, b))}),
        metrics=list(METRICS),
        a=a,
        b=b,
        metric=metric,
        fault=fault,
        found=found,
    )


def _compared(ask: Ask, a: str, b: str, metric: str) -> dict[str, Any]:
    if metric not in METRICS:
        raise MetricError(f"{metric[:50]!r} is no metric; expected one of {', '.join(METRICS)}")
    first, second = run_folder(ask.site.root, a), run_folder(ask.site.root, b)
    if a == b and len(prediction_steps(first.uri)) < 2:
        raise MetricError(f"{a} was evaluated once; choose another run to compare it with")
    comparison = compare_runs(first.uri, second.uri, metric=metric)
    return {
        "rows": [_row(comparison, kind) for kind in comparison.by_type],
        "gained": comparison.gained[:MOST_CHANGES],
        "lost": comparison.lost[:MOST_CHANGES],
        "more_gained": max(0, len(comparison.gained) - MOST_CHANGES),
        "more_lost": max(0, len(comparison.lost) - MOST_CHANGES),
        "only_a": comparison.only_a,
        "only_b": comparison.only_b,
    }


def _row(comparison: Comparison, kind: str) -> ChangeRow:
    metric, change = comparison.metric, comparison.by_type[kind]
    certain = change.difference["low"] > 0 or change.difference["high"] < 0
    better = (change.difference["value"] > 0) != METRICS[metric].error_rate
    return ChangeRow(
        kind,
        f"{change.a['samples']:,}",
        shown(metric, change.a["value"]),
        shown(metric, change.b["value"]),
        shown(metric, change.difference["value"], sign=True),
        interval(metric, change.difference, sign=True),
        f"{change.gained:,}",
        f"{change.lost:,}",
        f"{change.p_value:.2g}",
        ("right" if better else "wrong") if certain else "",
    )
