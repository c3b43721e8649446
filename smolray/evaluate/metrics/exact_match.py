"""Exact match: the prediction is one of the reference answers."""

from collections.abc import Sequence

from smolray.evaluate.bootstrap import SampleScores
from smolray.run.predictions import Prediction


def score(predictions: Sequence[Prediction]) -> SampleScores:
    """1 for a right answer, else 0."""
    return SampleScores.mean([is_correct(p["prediction"], p["answers"]) for p in predictions])


def is_correct(text: str, answers: Sequence[str]) -> bool:
    """Whether `text` is one of the answers; case and outer white space do not count."""
    return any(text.strip().casefold() == answer.strip().casefold() for answer in answers)
