"""The interval of an estimate covers the truth as often as it says."""

import numpy as np
import pytest

from smolray.evaluate.bootstrap import MetricError, SampleScores, estimate


def coverage(draw, truth, trials=300):
    """How often the interval of `draw(rng)` -> (values, keys) holds the truth."""
    rng = np.random.default_rng(7)
    inside = 0
    for _ in range(trials):
        values, keys = draw(rng)
        found = estimate(SampleScores.mean(values), keys, resamples=400)
        inside += found["low"] <= truth <= found["high"]
    return inside / trials


def test_the_interval_covers_the_truth_in_95_of_100_samples():
    def draw(rng):
        return rng.random(200) < 0.3, [str(n) for n in range(200)]

    assert 0.91 <= coverage(draw, 0.3) <= 0.98


def test_the_interval_covers_the_truth_where_questions_share_an_image():
    """Eight questions an image, all right or all wrong: as if each stood alone, the interval would hold the truth in
    about half the samples.
    """

    def draw(rng, alone=False):
        values = np.repeat(rng.random(120) < 0.3, 8)
        return values, [str(n if alone else n // 8) for n in range(len(values))]

    assert 0.91 <= coverage(draw, 0.3) <= 0.98
    assert coverage(lambda rng: draw(rng, alone=True), 0.3) < 0.7


def test_the_bootstrap_resamples_images_and_is_the_same_each_time():
    rng = np.random.default_rng(0)
    values, keys = rng.random(60), [str(n) for n in rng.integers(0, 25, 60)]
    got = estimate(SampleScores.mean(values), keys, resamples=4000)
    assert got == estimate(SampleScores.mean(values), keys, resamples=4000) and got["samples"] == 60
    groups = [np.flatnonzero(np.array(keys) == key) for key in sorted(set(keys))]
    plain = [
        values[np.concatenate([groups[i] for i in rng.integers(0, len(groups), len(groups))])].mean()
        for _ in range(4000)
    ]
    assert (got["low"], got["high"]) == pytest.approx(tuple(np.quantile(plain, [0.025, 0.975])), abs=0.01)
    assert estimate(SampleScores.mean([1.0] * 5), list("abcde")) == {
        "value": 1.0,
        "low": 1.0,
        "high": 1.0,
        "samples": 5,
    }
    with pytest.raises(MetricError, match="no prediction"):
        estimate(SampleScores.mean([]), [])
