"""Two checkpoints side by side, question by question: which answers got better or worse, and whether the difference is
more than chance.

In: the predictions of two evaluations of the same data. Out: a Comparison, over all and by question type.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from smolray.evaluate.bootstrap import Figure, MetricError, Scores, figure
from smolray.evaluate.metrics import METRICS, by_type
from smolray.run.predictions import Record, prediction_steps, read_predictions


@dataclass(frozen=True)
class Change:
    """From `a` to `b` on the same questions.

    `difference` is b - a with its paired bootstrap interval; `p_value`: see `mcnemar`.
    """

    a: Figure
    b: Figure
    difference: Figure
    gained: int
    lost: int
    p_value: float


@dataclass(frozen=True)
class Comparison:
    """`by_type` has "overall" first.

    `gained` and `lost` hold the questions whose score rose or fell: id, key, type, question, answers, both predictions
    (a, b) and both scores (score_a, score_b). `only_a`, `only_b`: questions that one of them lacks; they are in no
    figure.
    """

    metric: str
    by_type: dict[str, Change]
    gained: list[Record]
    lost: list[Record]
    only_a: int = 0
    only_b: int = 0


def compare_runs(
    run_a: str, run_b: str, step_a: int | None = None, step_b: int | None = None, metric: str = "exact_match"
) -> Comparison:
    """Compare the kept predictions of two run folders; one folder twice compares two steps.

    Without steps: the newest of each, or of one folder the two newest. Raises MetricError where a step was not
    evaluated or the data differ.
    """
    kept_a, kept_b = prediction_steps(run_a), prediction_steps(run_b)
    step_b = step_b if step_b is not None else max(kept_b, default=None)
    if step_a is None:
        step_a = max(
            (step for step in kept_a if run_a != run_b or (step_b is not None and step < step_b)), default=None
        )
    for run, step, kept in ((run_a, step_a, kept_a), (run_b, step_b, kept_b)):
        if step not in kept:
            asked = "another evaluation to compare with" if step is None else f"predictions of step {step}"
            raise MetricError(f"{run}: expected {asked}, found steps {kept or 'none'}; `smolray evaluate` makes them")
    assert step_a is not None and step_b is not None
    return compare_predictions(read_predictions(run_a, step_a), read_predictions(run_b, step_b), metric)


def compare_predictions(a: Sequence[Record], b: Sequence[Record], metric: str = "exact_match") -> Comparison:
    """Compare two lists of prediction records, matched by image and id.

    Raises MetricError where they share no question, a question stands twice, or its reference answers differ.
    """
    if metric not in METRICS:
        raise MetricError(f"metric = {metric!r}; expected one of {', '.join(METRICS)}")
    first, second = _by_question(a), _by_question(b)
    both = [name for name in first if name in second]
    if not both:
        raise MetricError(
            f"the two evaluations share no question ({len(first)} and {len(second)}): they are not of the same data"
        )
    for name in both:
        if list(first[name]["answers"]) != list(second[name]["answers"]):
            raise MetricError(
                f"question {name[1]!r} has other reference answers in the second evaluation: they are not of the same data"
            )
    mine, other = [first[name] for name in both], [second[name] for name in both]
    scores_a, scores_b = METRICS[metric](mine), METRICS[metric](other)
    keys, each_a, each_b = np.array([name[0] for name in both], object), scores_a.per_sample(), scores_b.per_sample()
    rose, fell = each_b > each_a + 1e-9, each_b < each_a - 1e-9
    changes = {}
    for kind, rows in by_type(mine).items():
        parts = (scores_a.take(rows), scores_b.take(rows))
        gained, lost = int(rose[rows].sum()), int(fell[rows].sum())
        a_figure, b_figure, difference = (figure(s, keys[rows]) for s in (*parts, _difference(*parts)))
        changes[kind] = Change(a_figure, b_figure, difference, gained, lost, mcnemar(gained, lost))

    def pairs(which: np.ndarray) -> list[Record]:
        return [_pair(mine[i], other[i], each_a[i], each_b[i]) for i in np.flatnonzero(which)]

    return Comparison(metric, changes, pairs(rose), pairs(fell), len(first) - len(both), len(second) - len(both))


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p-value of McNemar's exact test: the chance of a split at least as uneven if gains and losses were
    equally likely.

    For graded scores it is the sign test. It takes questions for independent; the interval of the difference does not.
    """
    count, ways, total = gained + lost, 1, 1
    for i in range(min(gained, lost)):
        ways = ways * (count - i) // (i + 1)
        total += ways
    return min(1.0, 2 * total / 2**count)


def _difference(a: Scores, b: Scores) -> Scores:
    width = a.statistics.shape[1]
    return Scores(
        np.hstack([a.statistics, b.statistics]),
        lambda sums, counts: b.combine(sums[:, width:], counts) - a.combine(sums[:, :width], counts),
    )


def _by_question(records: Sequence[Record]) -> dict[tuple[str, str], Record]:
    found: dict[tuple[str, str], Record] = {}
    for record in records:
        name = (record["key"], record["id"])
        if name in found:
            raise MetricError(
                f"question {record['id']!r} stands twice in one evaluation: it cannot be told which to compare"
            )
        found[name] = record
    return found


def _pair(a: Record, b: Record, score_a: float, score_b: float) -> Record:
    kept = {k: a[k] for k in ("id", "key", "type", "question", "answers")}
    return kept | {"a": a["prediction"], "b": b["prediction"], "score_a": float(score_a), "score_b": float(score_b)}
