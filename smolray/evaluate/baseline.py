"""The accuracy without the image: each question gets the most frequent training answer to the same words.

Only accuracy above it shows that the model uses the image. In: the answers of the training data, predictions. Out: an
accuracy.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import pyarrow as pa

from smolray.evaluate.metrics.exact_match import is_correct
from smolray.run.predictions import Prediction


def blind_baseline(training: Iterable[pa.Table], predictions: Sequence[Prediction]) -> float:
    """Fraction of the evaluated questions that the most frequent answers get right, by the same rule as predictions.

    Questions that do not occur in training get the most frequent answer of all. `training`: tables of question, answer
    and count.
    """
    by_question: dict[str, Counter[str]] = {}
    overall: Counter[str] = Counter()
    for table in training:
        for row in table.to_pylist():
            by_question.setdefault(row["question"], Counter())[row["answer"]] += row["count"]
            overall[row["answer"]] += row["count"]

    guesses = (by_question.get(p["question"], overall).most_common(1)[0][0] for p in predictions)
    right = sum(is_correct(guess, p["answers"]) for guess, p in zip(guesses, predictions, strict=True))
    return right / len(predictions) if predictions else 0.0
