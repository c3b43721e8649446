"""Token F1: how many words prediction and reference share, as SQuAD defines it (arXiv:1606.05250, section 6.1).

For answers of several words, which exact match calls wrong for one word too many. The rules are those of SQuAD's
evaluate-v2.0.py.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

from smolray.evaluate.bootstrap import SampleScores
from smolray.run.predictions import Prediction

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def score(predictions: Sequence[Prediction]) -> SampleScores:
    """Best F1 over the references, 0 to 1."""
    return SampleScores.mean([max(token_f1(p["prediction"], answer) for answer in p["answers"]) for p in predictions])


def token_f1(text: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the words; a word counts as often as it occurs.

    Where one of the two has no words, 1 if neither has any, else 0.
    """
    predicted, wanted = words(text), words(answer)
    if not predicted or not wanted:
        return float(predicted == wanted)

    shared = (Counter(predicted) & Counter(wanted)).total()
    return 2 * shared / (len(predicted) + len(wanted))


def words(text: str) -> list[str]:
    """Words in lower case, without punctuation and articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()
