"""The metrics of an evaluation, over all predictions and by question type.

In: predictions and names of metrics. Out: each metric's estimates: value, 95 % interval, number of samples.
"""

from collections.abc import Sequence
from importlib import import_module

import numpy as np

from smolray.config import METRICS
from smolray.evaluate.bootstrap import Estimate, Estimates, MetricError, SampleScores, estimate
from smolray.run.predictions import Prediction
from smolray.run.progress import percent


def measure(predictions: Sequence[Prediction], metrics: Sequence[str]) -> tuple[dict[str, Estimates], dict[str, str]]:
    """Estimates of each metric by question type, and for each metric that cannot be computed the reason.

    Training continues without such a metric.
    """
    measured: dict[str, Estimates] = {}
    skipped: dict[str, str] = {}
    for metric in metrics if predictions else ():
        try:
            measured[metric] = estimates_by_type(sample_scores(metric, predictions), predictions)
        except MetricError as error:
            skipped[metric] = str(error)
    return measured, skipped


def sample_scores(metric: str, predictions: Sequence[Prediction]) -> SampleScores:
    """What `smolray/evaluate/metrics/<metric>.py` says of each prediction. Raises MetricError."""
    if metric not in METRICS:
        raise MetricError(f"metric = {metric!r}; expected one of {', '.join(METRICS)}")
    scores: SampleScores = import_module(f"smolray.evaluate.metrics.{metric}").score(predictions)
    return scores


def estimates_by_type(scores: SampleScores, predictions: Sequence[Prediction]) -> Estimates:
    """The estimate over all and of each question type; `scores` are those of the predictions."""
    keys = np.array([prediction["key"] for prediction in predictions], object)
    return {kind: estimate(scores.take(rows), keys[rows]) for kind, rows in rows_by_type(predictions).items()}


def rows_by_type(predictions: Sequence[Prediction]) -> dict[str, np.ndarray]:
    """Row numbers of each question type, "overall" first, the others by name."""
    kinds = np.array([prediction["type"] or "" for prediction in predictions], object)
    named = sorted({kind for kind in kinds if kind} - {"overall"})
    return {"overall": np.arange(len(predictions))} | {kind: np.flatnonzero(kinds == kind) for kind in named}


def goodness(metric: str, value: float) -> float:
    """A value of a metric as a number that is higher the better: an error rate counts as 1 - rate."""
    return 1 - value if metric in METRICS and METRICS[metric].error_rate else value


def shown(metric: str, value: float, sign: bool = False) -> str:
    """A value as tables print it; `sign`: a difference, with its + or -."""
    in_percent = metric not in METRICS or METRICS[metric].percent
    text = percent(abs(value)) if in_percent else f"{abs(value):.3f}"
    return ("-" if value < 0 else "+" if sign else "") + text


def interval(metric: str, found: Estimate, sign: bool = False) -> str:
    """The 95 % interval as tables print it: 65.1 to 68.9 %."""
    return f"{shown(metric, found['low'], sign).removesuffix(' %')} to {shown(metric, found['high'], sign)}"
