"""Relaxed accuracy: ChartQA's rule, which lets a number be off by 5 % (arXiv:2203.10244, section 5.1)."""

import math
from collections.abc import Sequence

from smolray.evaluate.bootstrap import SampleScores
from smolray.run.predictions import Prediction

TOLERANCE = 0.05


def score(predictions: Sequence[Prediction]) -> SampleScores:
    """1 where the prediction matches a reference, else 0."""
    return SampleScores.mean([relaxed_match(p["prediction"], p["answers"]) for p in predictions])


def relaxed_match(text: str, answers: Sequence[str]) -> bool:
    """A number within 5 % of |gold|, any other answer equal but for case.

    A percentage counts as its hundredth. Where gold is 0, or has thousands separators, only the same text is right, as
    in the published code.
    """
    return any(_matches(text.strip(), answer.strip()) for answer in answers)


def _matches(text: str, gold: str) -> bool:
    predicted, wanted = _number(text), _number(gold)
    if predicted is not None and wanted:
        return abs(predicted - wanted) / abs(wanted) <= TOLERANCE
    return text.lower() == gold.lower()


def _number(text: str) -> float | None:
    try:
        value = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
