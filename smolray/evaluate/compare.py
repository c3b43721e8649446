"""Two checkpoints question by question: which answers got better or worse.

The difference has an interval, and a test says whether it is more than chance.

In: the predictions of two evaluations of the same data. Out: a Comparison, over all and by question type.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from smolray.config import METRICS
from smolray.evaluate.bootstrap import Estimate, MetricError, SampleScores, estimate
from smolray.evaluate.measure import rows_by_type, sample_scores
from smolray.run.predictions import Prediction, prediction_steps, read_predictions

Key = tuple[str, str]  # of a question: image key and id


@dataclass(frozen=True)
class Change:
    """From `a` to `b` on the same questions.

    Attributes:
        difference: b - a with its paired bootstrap interval.
        gained, lost: questions that b answers better or worse.
        p_value: see `mcnemar`.
    """

    a: Estimate
    b: Estimate
    difference: Estimate
    gained: int
    lost: int
    p_value: float


@dataclass(frozen=True)
class Comparison:
    """Two evaluations under one metric.

    Attributes:
        by_type: "overall" first.
        gained, lost: the questions that b answers better or worse: id, key, type, question, answers, both predictions
            (a, b) and the metric of each (metric_a, metric_b).
        only_a, only_b: questions that one evaluation lacks; they are in no estimate.
    """

    metric: str
    by_type: dict[str, Change]
    gained: list[dict[str, Any]]
    lost: list[dict[str, Any]]
    only_a: int = 0
    only_b: int = 0


def compare_runs(
    run_a: str, run_b: str, step_a: int | None = None, step_b: int | None = None, metric: str = "exact_match"
) -> Comparison:
    """Compare the kept predictions of two run folders; one folder twice compares two steps.

    Without steps: the newest of each, or of one folder the two newest.

    Raises MetricError where a step was not evaluated or the data differ.
    """
    kept_a, kept_b = prediction_steps(run_a), prediction_steps(run_b)
    if step_b is None:
        step_b = max(kept_b, default=None)
    if step_a is None:
        earlier = [step for step in kept_a if run_a != run_b or (step_b is not None and step < step_b)]
        step_a = max(earlier, default=None)

    return compare_predictions(_read(run_a, step_a, kept_a), _read(run_b, step_b, kept_b), metric)


def compare_predictions(a: Sequence[Prediction], b: Sequence[Prediction], metric: str = "exact_match") -> Comparison:
    """Compare two lists of predictions, matched by image and id.

    Raises MetricError for an unknown metric, and where they share no question, a question occurs twice, or its
    reference answers differ.
    """
    by_key_a, by_key_b = _by_key(a), _by_key(b)
    shared = _shared(by_key_a, by_key_b)
    of_a, of_b = [by_key_a[key] for key in shared], [by_key_b[key] for key in shared]
    scores_a, scores_b = sample_scores(metric, of_a), sample_scores(metric, of_b)

    each_a, each_b = scores_a.per_sample(), scores_b.per_sample()
    rise = each_a - each_b if METRICS[metric].error_rate else each_b - each_a
    better, worse = rise > 1e-9, rise < -1e-9

    images = np.array([key for key, _ in shared], object)
    changes = {
        kind: _change(scores_a.take(rows), scores_b.take(rows), images[rows], better[rows], worse[rows])
        for kind, rows in rows_by_type(of_a).items()
    }
    gained, lost = (
        [_side_by_side(of_a[i], of_b[i], each_a[i], each_b[i]) for i in np.flatnonzero(which)]
        for which in (better, worse)
    )
    return Comparison(metric, changes, gained, lost, len(by_key_a) - len(shared), len(by_key_b) - len(shared))


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p-value of McNemar's exact test.

    It is the chance of a split at least as uneven if gains and losses were equally likely.

    For graded scores it is the sign test. It takes questions for independent; the interval of the difference does not.
    """
    count, ways, total = gained + lost, 1, 1
    for i in range(min(gained, lost)):
        ways = ways * (count - i) // (i + 1)
        total += ways
    return min(1.0, 2 * total / 2**count)


def _read(run: str, step: int | None, kept: list[int]) -> list[Prediction]:
    if step is None or step not in kept:
        expected = "another evaluation to compare with" if step is None else f"predictions of step {step}"
        raise MetricError(f"{run}: expected {expected}, found steps {kept or 'none'}; `smolray evaluate` makes them")
    return read_predictions(run, step)


def _by_key(predictions: Sequence[Prediction]) -> dict[Key, Prediction]:
    found: dict[Key, Prediction] = {}
    for prediction in predictions:
        key = (prediction["key"], prediction["id"])
        if key in found:
            raise MetricError(f"question {prediction['id']!r} occurs twice in one evaluation: it cannot be compared")
        found[key] = prediction
    return found


def _shared(a: dict[Key, Prediction], b: dict[Key, Prediction]) -> list[Key]:
    """The questions of both. Raises MetricError where there are none, or one has other reference answers."""
    shared = [key for key in a if key in b]
    if not shared:
        raise MetricError(
            f"the two evaluations share no question ({len(a)} and {len(b)}): they are not of the same data"
        )
    for key in shared:
        if list(a[key]["answers"]) != list(b[key]["answers"]):
            raise MetricError(
                f"question {key[1]!r} has other reference answers in the second evaluation: "
                "they are not of the same data"
            )
    return shared


def _change(a: SampleScores, b: SampleScores, images: np.ndarray, better: np.ndarray, worse: np.ndarray) -> Change:
    a_value, b_value, difference = (estimate(scores, images) for scores in (a, b, _difference(a, b)))
    gained, lost = int(better.sum()), int(worse.sum())
    return Change(a_value, b_value, difference, gained, lost, mcnemar(gained, lost))


def _difference(a: SampleScores, b: SampleScores) -> SampleScores:
    width = a.statistics.shape[1]
    return SampleScores(
        np.hstack([a.statistics, b.statistics]),
        lambda sums, counts: b.combine(sums[:, width:], counts) - a.combine(sums[:, :width], counts),
    )


def _side_by_side(a: Prediction, b: Prediction, metric_a: float, metric_b: float) -> dict[str, Any]:
    kept = {name: a[name] for name in ("id", "key", "type", "question", "answers")}
    return kept | {
        "a": a["prediction"],
        "b": b["prediction"],
        "metric_a": float(metric_a),
        "metric_b": float(metric_b),
    }
