"""Caption metrics as COCO's evaluation computes them: BLEU-4, ROUGE-L and CIDEr over several references.

In: tokenised captions with their references. Out: Scores. The definitions are the libraries': sacrebleu, and the two
scorers of pycocoevalcap that are plain Python (its tokenizer, METEOR and SPICE want Java and are not used).

`tokens` stands in for COCO's Penn Treebank tokenizer: lower case, clitics split off ("don't" -> do n't), punctuation
dropped. On plain captions it says the same; abbreviations and symbols may differ, which moves a figure in the third
digit.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from smolray.evaluate.bootstrap import MetricError, Scores

ORDER = 4
_WORD = re.compile(r"n't\b|'(?:s|re|ve|ll|d|m)\b|\w+(?=n't\b)|\w+(?:[-.,/:]\w+)*")


def tokens(text: str) -> str:
    """A caption as words with one blank between them."""
    return " ".join(_WORD.findall(text.lower().replace("’", "'")))


def bleu(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """Corpus BLEU-4 of 0 to 1, closest reference length, not smoothed: of one caption alone it is often 0."""
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise _lacking("bleu", "sacrebleu") from error
    scorer = BLEU(tokenize="none", smooth_method="none", force=True, max_ngram_order=ORDER)
    counted = [
        scorer.corpus_score([tokens(c)], [[tokens(r)] for r in refs])
        for c, refs in zip(captions, references, strict=True)
    ]
    statistics = np.array([[s.sys_len, s.ref_len, *s.counts, *s.totals] for s in counted], np.float64).reshape(
        -1, 2 + 2 * ORDER
    )

    def combine(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
        return (
            np.array(
                [
                    BLEU.compute_bleu(row[2:-ORDER], row[-ORDER:], row[0], row[1]).score
                    for row in sums.astype(np.int64).tolist()
                ]
            )
            / 100
        )

    return Scores(statistics, combine)


def rouge_l(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """Mean of ROUGE-L (F with beta 1.2; best precision and best recall over the references), 0 to 1."""
    scorer = _coco("rouge_l", "pycocoevalcap.rouge.rouge").Rouge()
    said = zip(captions, references, strict=True)
    return Scores.mean(
        [scorer.calc_score([tokens(c)], [tokens(r) for r in refs]) if tokens(c) else 0.0 for c, refs in said]
    )


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """Mean of CIDEr-D, 0 to 10 (tables often print 100 times that).

    Words weigh by how few images have them in their references, over all the samples here: words that all share count
    nothing, so figures of different subsets do not compare, and a single image scores 0. Raises MetricError where no
    reference has a word.
    """
    scorer = _coco("cider", "pycocoevalcap.cider.cider_scorer").CiderScorer()
    for caption, refs in zip(captions, references, strict=True):
        scorer += (tokens(caption), [tokens(r) for r in refs])
    if not any(counts for refs in scorer.crefs for counts in refs):
        raise MetricError("cider: no reference caption has a word")
    return Scores.mean(scorer.compute_score()[1])


def _coco(metric: str, module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise _lacking(metric, "pycocoevalcap") from error


def _lacking(metric: str, package: str) -> MetricError:
    return MetricError(
        f"{metric} needs the package {package}, which is not installed here: pip install 'smolray[eval]'"
    )
