"""Relaxed accuracy is ChartQA's rule."""

import pytest

from smolray.evaluate.metrics.relaxed_accuracy import relaxed_match


@pytest.mark.parametrize(
    ("prediction", "gold", "right"),
    [
        ("10", "10", True),
        ("10.5", "10", True),
        ("10.51", "10", False),
        ("9.5", "10", True),
        ("9.49", "10", False),
        # divided by |gold|: else every value below a negative one is right
        ("-10.5", "-10", True),
        ("-9.4", "-10", False),
        ("10", "-10", False),
        ("0", "0", True),
        ("0.0", "0", False),
        ("0.001", "0", False),  # gold 0: the text decides
        ("5%", "0.05", True),
        ("5.2%", "5%", True),
        ("50%", "50", False),
        ("yes", "Yes", True),
        ("yes", "no", False),
        ("2 000", "2000", False),
        ("1,000", "1,000", True),
        ("1000", "1,000", False),
        ("nan", "10", False),
        ("inf", "inf", True),
        ("", "3", False),
    ],
)
def test_relaxed_accuracy_allows_five_percent_of_the_absolute_gold(prediction, gold, right):
    assert relaxed_match(prediction, [gold]) is right
    assert relaxed_match(prediction, ["unlike", gold]) is right, "the best of the references"
