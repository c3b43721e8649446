"""From the scores of single samples to one value with its interval, in one place for all metrics.

In: SampleScores, additive statistics of every sample. Out: an Estimate: value, bootstrap 95 % interval, number of
samples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

RESAMPLES = 1000
COVERAGE = 0.95
MAX_NUMBERS = 4_000_000  # drawn at a time: 32 MB


class MetricError(ValueError):
    """A metric does not apply to these predictions, or its package is not installed; the message says what to do."""


class Estimate(TypedDict):
    """A metric over some samples. `low` and `high`: the 95 % interval."""

    value: float
    low: float
    high: float
    samples: int


Estimates = dict[str, Estimate]  # by question type, with "overall"


@dataclass(frozen=True)
class SampleScores:
    """The statistics of each sample under a metric. They are additive.

    A mean has one statistic. A corpus metric such as BLEU has several: it adds up its n-gram counts and divides last.

    Attributes:
        statistics: (samples, k) float64.
        combine: sums (R, k) and numbers of samples (R,) -> values (R,).
    """

    statistics: np.ndarray
    combine: Callable[[np.ndarray, np.ndarray], np.ndarray]

    @classmethod
    def mean(cls, values: Sequence[float] | np.ndarray) -> "SampleScores":
        """The mean of one value for each sample: (samples,)."""
        return cls(np.asarray(values, np.float64).reshape(-1, 1), _mean)

    def per_sample(self) -> np.ndarray:
        """The metric of each sample alone: (samples,) float64."""
        return self.combine(self.statistics, np.ones(len(self.statistics)))

    def take(self, rows: np.ndarray) -> "SampleScores":
        """The scores of some samples."""
        return SampleScores(self.statistics[rows], self.combine)


def estimate(
    scores: SampleScores, keys: Sequence[str] | np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Value over all samples with its percentile bootstrap interval; the same input gives the same interval.

    `keys` name the image of each sample. Images are resampled, each with all its samples: questions about one image are
    not independent, and resampling single questions gives intervals that are too narrow. Corpus metrics are computed
    anew from the resampled statistics; what a metric learned from all references (CIDEr's document frequencies) stays
    as it is.

    Raises MetricError without samples.
    """
    count = len(scores.statistics)
    if not count:
        raise MetricError("there is no prediction to score")

    images: dict[str, int] = {}
    numbers = np.array([images.setdefault(key, len(images)) for key in keys])
    sums = np.zeros((len(images), scores.statistics.shape[1] + 1))
    np.add.at(sums, numbers, np.column_stack([scores.statistics, np.ones(count)]))
    total = sums.sum(0, keepdims=True)

    # A resample is determined by how often it holds each distinct row, and those counts are multinomial. Scores that
    # are 0 or 1 have few distinct rows.
    rows, often = np.unique(sums, axis=0, return_counts=True)
    rng, values = np.random.default_rng(seed), []
    for start in range(0, resamples, size := max(1, MAX_NUMBERS // len(rows))):
        drawn = rng.multinomial(len(images), often / len(images), size=min(size, resamples - start)) @ rows
        values.append(scores.combine(drawn[:, :-1], drawn[:, -1]))

    low, high = np.quantile(np.concatenate(values), [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    value = scores.combine(total[:, :-1], total[:, -1])[0]
    return {"value": float(value), "low": float(low), "high": float(high), "samples": count}


def missing_package(metric: str, package: str) -> MetricError:
    """The error of a metric whose package is not installed."""
    return MetricError(
        f"{metric} needs the package {package}, which is not installed here: pip install 'smolray[eval]'"
    )


def _mean(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return sums[:, 0] / counts
