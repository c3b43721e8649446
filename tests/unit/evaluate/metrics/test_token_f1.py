"""Token F1 is that of SQuAD's evaluation."""

import pytest

from smolray.evaluate.measure import sample_scores
from smolray.evaluate.metrics.token_f1 import token_f1
from tests.predictions import predicted


@pytest.mark.parametrize(
    ("text", "answer", "f1"),
    [
        ("12 March 2019", "12 March 2019", 1),
        ("The 12 march, 2019.", "12 March 2019", 1),  # case, punctuation and articles do not count
        ("on 12 March 2019", "12 March 2019", 2 * (3 / 4) * 1 / (3 / 4 + 1)),
        ("March", "12 March 2019", 2 * 1 * (1 / 3) / (1 + 1 / 3)),
        ("2019 March 12", "12 March 2019", 1),  # a bag of words
        ("the the cat cat", "cat", 2 * (1 / 2) * 1 / (1 / 2 + 1)),  # a word counts as often as it occurs
        ("well-known", "well known", 0),  # punctuation goes without a blank in its place
        ("U.S.A.", "usa", 1),
        ("theatre", "atre", 0),  # articles are whole words
        ("dog", "cat", 0),
        ("", "cat", 0),
        ("cat", "", 0),
        ("the", "an", 1),  # neither has a word
    ],
)
def test_token_f1_by_hand(text, answer, f1):
    assert token_f1(text, answer) == pytest.approx(f1)


def test_the_best_reference_counts():
    scores = sample_scores(
        "token_f1", [predicted("red bus", "blue car", "the red double-decker bus"), predicted("a", "b")]
    )
    assert scores.per_sample() == pytest.approx([2 * 2 / (2 + 3), 0])
