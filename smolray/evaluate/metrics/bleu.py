"""BLEU-4 of captions, as sacrebleu computes it over the whole set."""

from collections.abc import Sequence

import numpy as np

from smolray.evaluate.bootstrap import SampleScores, missing_package
from smolray.evaluate.metrics.caption_tokens import tokens
from smolray.run.predictions import Prediction

ORDER = 4


def score(predictions: Sequence[Prediction]) -> SampleScores:
    """Corpus BLEU-4, 0 to 1: closest reference length, not smoothed, so that of one caption alone it is often 0.

    Raises MetricError without the package.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise missing_package("bleu", "sacrebleu") from error

    scorer = BLEU(tokenize="none", smooth_method="none", force=True, max_ngram_order=ORDER)
    counted = [
        scorer.corpus_score([tokens(p["prediction"])], [[tokens(answer)] for answer in p["answers"]])
        for p in predictions
    ]
    rows = [[one.sys_len, one.ref_len, *one.counts, *one.totals] for one in counted]
    statistics = np.array(rows, np.float64).reshape(-1, 2 + 2 * ORDER)

    def combine(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
        scores = [
            BLEU.compute_bleu(correct[:ORDER], correct[ORDER:], length, reference_length).score
            for length, reference_length, *correct in sums.astype(np.int64).tolist()
        ]
        return np.array(scores) / 100

    return SampleScores(statistics, combine)
