"""ANLS, the metric of DocVQA: average normalised Levenshtein similarity (arXiv:2007.00398, section 4.1).

ANLS*, whose package computes it, agrees with it on plain answers.
"""

from collections.abc import Sequence
from typing import Any

from smolray.evaluate.bootstrap import SampleScores, missing_package
from smolray.run.predictions import Prediction


def score(predictions: Sequence[Prediction]) -> SampleScores:
    """Best over the references of 1 - edit distance / longer length; below 0.5 it is 0.

    Raises MetricError without the package.
    """
    try:
        from anls_star import anls_score
    except ImportError as error:
        raise missing_package("anls", "anls-star") from error
    values: list[Any] = [anls_score(tuple(p["answers"]), p["prediction"]) for p in predictions]
    return SampleScores.mean(values)
