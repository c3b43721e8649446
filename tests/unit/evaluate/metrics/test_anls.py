"""ANLS is that of DocVQA."""

import pytest

from smolray.evaluate.measure import sample_scores
from tests.predictions import predicted


def test_anls_is_the_best_similarity_and_nothing_below_a_half():
    predictions = [
        predicted(p, *a)
        for p, a in [
            ("hello", ["hello"]),
            ("Hello  World", ["hello world"]),
            ("helo", ["hello"]),
            ("hxxxx", ["hello"]),
            ("helo", ["bye", "hello"]),
            ("", ["hello"]),
            ("ab", ["ax"]),
        ]
    ]
    assert sample_scores("anls", predictions).per_sample() == pytest.approx([1, 1, 0.8, 0, 0.8, 0, 0.5])
