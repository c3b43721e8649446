"""The figures that papers print, as pure functions of prediction records.

In: records with key, type, prediction and answers. Out: each metric's value, interval and number of samples, over all
and by question type.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from smolray.evaluate import captions
from smolray.evaluate.bootstrap import Figure, MetricError, Scores, figure
from smolray.evaluate.vqa import vqa_accuracy
from smolray.run.predictions import Record
from smolray.run.progress import percent

Metric = Callable[[Sequence[Record]], Scores]
Figures = dict[str, Figure]  # by question type, with "overall"


def measure(records: Sequence[Record], names: Sequence[str]) -> tuple[dict[str, Figures], dict[str, str]]:
    """Figures of each named metric by question type, "overall" first; and why a metric is missing, by its name:
    training goes on without it.
    """
    figures: dict[str, Figures] = {}
    skipped: dict[str, str] = {}
    groups = by_type(records)
    keys = np.array([record["key"] for record in records], object)
    for name in names if records else ():
        try:
            scores = METRICS[name](records)
            figures[name] = {kind: figure(scores.take(rows), keys[rows]) for kind, rows in groups.items()}
        except MetricError as error:
            skipped[name] = str(error)
    return figures, skipped


def by_type(records: Sequence[Record]) -> dict[str, np.ndarray]:
    """Row numbers of each question type, "overall" first, the others by name."""
    kinds = np.array([record["type"] or "" for record in records], object)
    named = sorted({kind for kind in kinds if kind} - {"overall"})
    return {"overall": np.arange(len(records))} | {kind: np.flatnonzero(kinds == kind) for kind in named}


def is_correct(text: str, answers: Sequence[str]) -> bool:
    """Exact match with any reference answer, case and outer white space aside."""
    return any(text.strip().casefold() == answer.strip().casefold() for answer in answers)


def relaxed_match(text: str, answers: Sequence[str]) -> bool:
    """ChartQA's rule (section 5.1 of the paper): a number within 5 % of |gold|, any other answer equal but for case.

    A percentage counts as its hundredth. Where gold is 0, or has thousands separators, only the same text is right, as
    in the published code.
    """
    return any(_close(text.strip(), answer.strip()) for answer in answers)


def shown(metric: str, value: float, sign: bool = False) -> str:
    """A value as tables print it: in percent, CIDEr as it is; `sign`: a difference, with its + or -."""
    text = f"{abs(value):.3f}" if metric == "cider" else percent(abs(value))
    return ("-" if value < 0 else "+" if sign else "") + text


def interval(metric: str, figure: Figure, sign: bool = False) -> str:
    """The 95 % interval as tables print it: 65.1 to 68.9 %."""
    return f"{shown(metric, figure['low'], sign).removesuffix(' %')} to {shown(metric, figure['high'], sign)}"


def _close(text: str, gold: str) -> bool:
    said, truth = _number(text), _number(gold)
    if said is not None and truth:
        return abs(said - truth) / abs(truth) <= 0.05
    return text.lower() == gold.lower()


def _number(text: str) -> float | None:
    try:
        value = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _exact_match(records: Sequence[Record]) -> Scores:
    return Scores.mean([is_correct(r["prediction"], r["answers"]) for r in records])


def _vqa_accuracy(records: Sequence[Record]) -> Scores:
    return Scores.mean([vqa_accuracy(r["prediction"], r["answers"]) for r in records])


def _anls(records: Sequence[Record]) -> Scores:
    """Best over the references of 1 - edit distance / longer length; below 0.5 it is 0 (DocVQA; ANLS* agrees on plain
    answers).
    """
    try:
        from anls_star import anls_score
    except ImportError as error:
        raise MetricError(
            "anls needs the package anls-star, which is not installed here: pip install 'smolray[eval]'"
        ) from error
    values: list[Any] = [anls_score(tuple(r["answers"]), r["prediction"]) for r in records]
    return Scores.mean(values)


def _relaxed_accuracy(records: Sequence[Record]) -> Scores:
    return Scores.mean([relaxed_match(r["prediction"], r["answers"]) for r in records])


def _of_captions(metric: Callable[[Sequence[str], Sequence[Sequence[str]]], Scores]) -> Metric:
    return lambda records: metric([r["prediction"] for r in records], [r["answers"] for r in records])


METRICS: dict[str, Metric] = {
    "exact_match": _exact_match,
    "vqa_accuracy": _vqa_accuracy,
    "anls": _anls,
    "relaxed_accuracy": _relaxed_accuracy,
    "bleu": _of_captions(captions.bleu),
    "rouge_l": _of_captions(captions.rouge_l),
    "cider": _of_captions(captions.cider),
}
