"""Character error rate, the metric of text recognition: characters to change / characters of the reference.

An error rate of the whole set, as usual: long texts weigh more than short ones. It exceeds 1 where a model writes much
more than there is to read. Case and punctuation count; outer white space does not, and composed and decomposed letters
are the same (Unicode NFC).
"""

import unicodedata
from collections.abc import Sequence

import numpy as np

from smolray.evaluate.bootstrap import SampleScores
from smolray.run.predictions import Prediction


def score(predictions: Sequence[Prediction]) -> SampleScores:
    """Edits and reference length of each prediction, against the reference with the lowest rate."""
    statistics = [_closest(p["prediction"], p["answers"]) for p in predictions]
    return SampleScores(np.array(statistics, np.float64).reshape(-1, 2), _rate)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: the fewest insertions, deletions and replacements that turn `a` into `b`."""
    target = np.array([ord(letter) for letter in b], np.int64)
    columns = np.arange(len(b) + 1)
    row = columns.copy()
    for number, letter in enumerate(a, 1):
        kept_or_replaced = row[:-1] + (target != ord(letter))
        row = np.concatenate([[number], np.minimum(kept_or_replaced, row[1:] + 1)])
        # an insertion costs 1 more than the cell to its left
        row = np.minimum.accumulate(row - columns) + columns
    return int(row[-1])


def _closest(text: str, answers: Sequence[str]) -> tuple[int, int]:
    predicted = _clean(text)
    found = [(edit_distance(predicted, _clean(answer)), len(_clean(answer))) for answer in answers]
    return min(found, key=lambda pair: (pair[0] / max(pair[1], 1), pair[0]))


def _clean(text: str) -> str:
    return unicodedata.normalize("NFC", text.strip())


def _rate(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return sums[:, 0] / np.maximum(sums[:, 1], 1)  # an empty reference counts as one character
