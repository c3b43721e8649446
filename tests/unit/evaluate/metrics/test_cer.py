"""The character error rate is edits / characters of the reference, over the whole set."""

import random

import pytest

from smolray.evaluate.bootstrap import estimate
from smolray.evaluate.measure import sample_scores
from smolray.evaluate.metrics.cer import edit_distance
from tests.predictions import predicted


def textbook_distance(a, b):
    """Wagner and Fischer, cell by cell."""
    table = [[i + j for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            replaced = table[i - 1][j - 1] + (a[i - 1] != b[j - 1])
            table[i][j] = min(replaced, table[i - 1][j] + 1, table[i][j - 1] + 1)
    return table[-1][-1]


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ("kitten", "sitting", 3),
        ("intention", "execution", 5),
        ("flaw", "lawn", 2),
        ("", "abc", 3),
        ("abc", "", 3),
        ("", "", 0),
        ("same", "same", 0),
    ],
)
def test_edit_distance_by_hand(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_edit_distance_is_the_textbooks():
    rng = random.Random(0)
    for _ in range(300):
        a, b = ("".join(rng.choices("abc", k=rng.randrange(9))) for _ in range(2))
        assert edit_distance(a, b) == textbook_distance(a, b)


def test_long_texts_weigh_more_than_short_ones():
    scores = sample_scores("cer", [predicted("Total: 15.00", "Total: 16.00"), predicted("ab", "cd")])
    assert scores.per_sample() == pytest.approx([1 / 12, 1])
    assert estimate(scores, ["a", "b"])["value"] == pytest.approx(3 / 14), "the mean of the two would be 13 / 24"


@pytest.mark.parametrize(
    ("text", "answers", "rate"),
    [
        (" INVOICE\n", ["INVOICE"], 0),
        ("invoice", ["INVOICE"], 1),  # case counts
        ("Cafe\u0301", ["Caf\u00e9"], 0),  # the same letter, composed
        ("hello hello", ["hello"], 6 / 5),  # more than there is to read
        ("abx", ["xyz", "abc"], 1 / 3),  # the nearest reference
        ("", ["abc"], 1),
        ("ab", [""], 2),  # nothing to read: counts as one character
        ("", [""], 0),
    ],
)
def test_error_rate_of_one_text(text, answers, rate):
    assert sample_scores("cer", [predicted(text, *answers)]).per_sample() == pytest.approx([rate])
