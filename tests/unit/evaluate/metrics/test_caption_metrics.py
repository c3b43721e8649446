"""The caption metrics are those of COCO's evaluation."""

import math

import numpy as np
import pytest

from smolray.evaluate.bootstrap import MetricError, estimate
from smolray.evaluate.measure import sample_scores
from smolray.evaluate.metrics.caption_tokens import tokens
from tests.predictions import predicted

CAPTIONS = [
    "a man riding a horse.",
    "Two dogs play in the snow",
    "a red bus parked on the street",
    "a cat on a mat",
    "the the the",
    "",
]
REFERENCES = [
    ["A man rides a horse", "a person riding a brown horse on the beach"],
    ["two dogs playing in snow", "Dogs play in the snow."],
    ["a red double-decker bus on a street", "the bus isn't moving", "a bus, parked"],
    ["a cat is on the mat", "a cat on a mat"],
    ["the cat", "a dog"],
    ["a tree"],
]


def score(metric, captions, references):
    found = [predicted(caption, *answers) for caption, answers in zip(captions, references, strict=True)]
    return sample_scores(metric, found)


def test_caption_tokens_are_words_in_lower_case_with_clitics_split_off():
    assert tokens("A man's T-shirt: \"don't\" cost 3.50, really?!") == "a man 's t-shirt do n't cost 3.50 really"
    assert tokens("It’s  a cafe\n") == "it 's a cafe" and tokens("?!") == ""


def test_bleu_is_the_bleu4_of_cocos_evaluation():
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for caption, references in zip(CAPTIONS, REFERENCES, strict=True):
        scorer += (tokens(caption), [tokens(r) for r in references])
    want = scorer.compute_score(option="closest", verbose=0)[0][3]
    got = estimate(score("bleu", CAPTIONS, REFERENCES), list("abcdef"))
    assert got["value"] == pytest.approx(want, rel=1e-6) and 0.2 < want < 0.9
    assert got["low"] <= got["value"] <= got["high"] <= 1 and got["low"] < got["high"]


def test_bleu_by_hand():
    """ "a b c d e" against "a b c d f": precisions 4/5, 3/4, 2/3, 1/2; and one word short, exp(1 - 5/4)."""
    assert score("bleu", ["a b c d e"], [["a b c d f"]]).per_sample() == pytest.approx(
        [(4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25]
    )
    assert score("bleu", ["a b c d"], [["a b c d f"]]).per_sample() == pytest.approx([math.exp(-0.25)])


def test_rouge_l_by_hand():
    """Longest common subsequence "a c d" of 4 and 5 words; F with beta 1.2."""
    precision, recall = 3 / 4, 3 / 5
    assert score("rouge_l", ["a b c d", "x", ""], [["a c e d f"], ["x"], ["y"]]).per_sample() == pytest.approx(
        [(1 + 1.44) * precision * recall / (recall + 1.44 * precision), 1, 0]
    )


def test_cider_by_hand():
    """Unit vectors of one n-gram each: only unigrams and bigrams exist, so a perfect caption scores 10 x 2 / 4; words
    all images share count 0.
    """
    assert score("cider", ["red bus", "blue car"], [["red bus"], ["blue car"]]).per_sample() == pytest.approx([5, 5])
    assert score("cider", ["red bus", "red bus"], [["red bus"], ["blue car"]]).per_sample() == pytest.approx([5, 0])
    assert score("cider", ["the bus", "the car"], [["the"], ["the"]]).per_sample() == pytest.approx([0, 0]), (
        "the is in every image"
    )
    with pytest.raises(MetricError, match="no reference caption has a word"):
        score("cider", ["a"], [["?"]])


def test_the_interval_of_bleu_is_that_of_resampled_corpora():
    from sacrebleu.metrics.bleu import BLEU

    rng = np.random.default_rng(1)
    words = np.array(list("abcdefg"))
    captions = [" ".join(rng.choice(words, 8)) for _ in range(40)]
    references = [[" ".join(w if rng.random() < 0.8 else "x" for w in c.split())] for c in captions]
    got = estimate(score("bleu", captions, references), [str(n) for n in range(40)], resamples=4000)
    drawn = []
    for _ in range(500):
        rows = rng.integers(0, 40, 40)
        corpus = BLEU(tokenize="none", smooth_method="none").corpus_score(
            [captions[i] for i in rows], [[references[i][0] for i in rows]]
        )
        drawn.append(corpus.score / 100)
    assert (got["low"], got["high"]) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.025)
    assert got["high"] - got["low"] > 0.15
