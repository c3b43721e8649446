"""The score of never looking: each question answered with the commonest training answer to the same words.

Only what lies above it shows that the model sees.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import pyarrow as pa

from smolray.evaluate.metrics import is_correct
from smolray.run.predictions import Record


def blind_baseline(training: Iterable[pa.Table], predictions: Sequence[Record]) -> float:
    """Share of the evaluated questions that the commonest answers get right, by the same rule as the model's own
    answers.

    Questions never seen in training get the commonest answer of all.
    """
    by_question: dict[str, Counter[str]] = {}
    overall: Counter[str] = Counter()
    for table in training:
        for line in table.to_pylist():
            by_question.setdefault(line["question"], Counter())[line["answer"]] += line["count"]
            overall[line["answer"]] += line["count"]
    guesses = (by_question.get(record["question"], overall).most_common(1)[0][0] for record in predictions)
    right = sum(is_correct(guess, record["answers"]) for guess, record in zip(guesses, predictions, strict=True))
    return right / len(predictions) if predictions else 0.0
