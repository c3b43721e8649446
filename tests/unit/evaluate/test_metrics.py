"""The metrics are those of their papers and published programs, and their intervals cover the truth as often as they
say.
"""

import math
from typing import get_args

import numpy as np
import pytest

from smolray.config import EvalConfig, Metric, load_config
from smolray.evaluate.bootstrap import MetricError, Scores, figure
from smolray.evaluate.captions import bleu, cider, rouge_l, tokens
from smolray.evaluate.evaluator import score, summarize
from smolray.evaluate.metrics import METRICS, interval, is_correct, measure, relaxed_match, shown
from smolray.evaluate.vqa import CONTRACTIONS, normalise, vqa_accuracy
from smolray.run.predictions import prediction_steps, read_predictions, write_predictions


def ten(*counted):
    """Ten annotators: ten(("yes", 3), ("no", 7))."""
    answers = [answer for answer, count in counted for _ in range(count)]
    assert len(answers) == 10
    return answers


# Text and what the published rules make of it; a row that only the program's quirks explain says which.
NORMALISED = [
    # lower case, blanks
    ("Yes", "yes"),
    ("NEW York", "new york"),
    ("  two   dogs ", "2 dogs"),
    ("", ""),
    # articles, as words only
    ("a dog", "dog"),
    ("an apple", "apple"),
    ("the man and the dog", "man and dog"),
    ("the", ""),
    ("A", ""),
    ("theatre", "theatre"),
    ("banana", "banana"),
    # number words, zero to ten and none
    ("zero", "0"),
    ("One", "1"),
    ("two", "2"),
    ("ten", "10"),
    ("none", "0"),
    ("eleven", "eleven"),
    ("twenty one", "twenty 1"),
    ("someone", "someone"),
    ("one-two", "1 2"),
    ("nobody", "nobody"),
    # contractions with one apostrophe missing
    ("dont", "don't"),
    ("Dont know", "don't know"),
    ("isnt", "isn't"),
    ("don't", "don't"),
    ("couldnt've", "couldn't've"),
    ("couldn'tve", "couldn't've"),
    ("oclock", "o'clock"),
    ("8 oclock", "8 o'clock"),
    ("yall", "y'all"),
    ("twas", "'twas"),
    ("whats", "what's"),
    ("couldntve", "couldntve"),  # two are missing: not in the list
    ("im", "im"),
    ("Im", "im"),
    ("ive", "ive"),  # the list has I'm and I've, but the text is lower case by then
    ("lets", "lets"),
    ("shes", "shes"),  # the list maps these spellings to themselves
    ("somebody'd", "somebodyd"),  # the list has it the wrong way round
    # apostrophes and colons stay
    ("girl's", "girl's"),
    ("girls", "girls"),
    ("2:50 pm", "2:50 pm"),
    # punctuation becomes a blank ...
    ("black/white", "black white"),
    ("t-shirt", "t shirt"),
    ("yes!no", "yes no"),
    ("red,white", "red white"),
    ("(left)", "left"),
    ("a_b", "b"),
    ("yes?", "yes"),
    # ... but goes where the same mark touches a blank anywhere
    ("black, white", "black white"),
    ("t-shirt - red", "tshirt red"),
    ("red,white, blue", "redwhite blue"),
    ("yes! no!", "yes no"),
    # commas between digits, and then all other marks too
    ("1,000", "1000"),
    ("100,978", "100978"),
    ("1,000 people", "1000 people"),
    ("1,000/day", "1000day"),
    ("1,2", "12"),
    ("3, 4", "3 4"),
    # full stops, except before a digit
    ("yes.", "yes"),
    ("u.s.a.", "usa"),
    ("3.5", "3.5"),
    (".5", ".5"),
    ("5.", "5"),
    ("mr. smith", "mr smith"),
    ("no.1", "no.1"),
    ("...", ""),
    ("." * 33, "."),  # re.UNICODE is passed as the number of stops to take out: 32
    # all at once
    ("The 2 dogs, isnt it?", "2 dogs isn't it"),
    ("An old-fashioned clock.", "old fashioned clock"),
    ("It's a 1,500.50 bill", "it's 1500.50 bill"),
]


@pytest.mark.parametrize(("text", "normalised"), NORMALISED, ids=[repr(text)[:30] for text, _ in NORMALISED])
def test_vqa_answers_are_normalised_by_the_published_rules(text, normalised):
    assert normalise(text) == normalised
    assert normalise.__wrapped__(normalised) == normalised or text in {"somebody'd", "." * 33}, "once is enough"


def test_every_contraction_of_the_list_is_one_apostrophe_away():
    assert len(CONTRACTIONS) == 114 and all(
        word.replace("'", "") == right.replace("'", "") for word, right in CONTRACTIONS.items()
    )
    assert len(set(CONTRACTIONS.values())) == 93


# Prediction, ten answers, accuracy: the fractions of leave-one-out, and what is normalised when.
SCORED = [
    ("yes", ten(("no", 10)), 0.0),
    ("yes", ten(("yes", 1), ("no", 9)), 0.3),
    ("yes", ten(("yes", 2), ("no", 8)), 0.6),
    ("yes", ten(("yes", 3), ("no", 7)), 0.9),
    ("yes", ten(("yes", 4), ("no", 6)), 1.0),
    ("yes", ten(("yes", 9), ("no", 1)), 1.0),
    ("no", ten(("yes", 3), ("no", 7)), 1.0),
    ("", ten(("yes", 3), ("no", 7)), 0.0),
    # where the answers differ, both sides are normalised
    ("Yes.", ten(("yes", 9), ("no", 1)), 1.0),
    ("two", ten(("2", 5), ("3", 5)), 1.0),
    ("2", ten(("two", 2), ("Two", 1), ("3", 7)), 0.9),
    ("the dog", ten(("dog", 1), ("a dog", 1), ("cat", 8)), 0.6),
    ("dont know", ten(("don't know", 4), ("no", 6)), 1.0),
    ("1000", ten(("1,000", 3), ("999", 7)), 0.9),
    ("t shirt", ten(("t-shirt", 2), ("shirt", 8)), 0.6),
    ("a", ten(("the", 4), ("b", 6)), 1.0),
    # where all are equal nothing is, but outer blanks, tabs and line breaks go
    ("yes", ten(("yes", 10)), 1.0),
    ("Yes", ten(("yes", 10)), 0.0),
    ("yes.", ten(("yes", 10)), 0.0),
    ("two", ten(("2", 10)), 0.0),
    ("1,000", ten(("1,000", 10)), 1.0),
    ("1000", ten(("1,000", 10)), 0.0),
    (" yes\n", ten(("yes", 10)), 1.0),
    ("new\tyork", ten(("new york", 10)), 1.0),
    ("yes", ten(("yes", 9), (" yes", 1)), 1.0),  # equal once the blanks are gone
    ("Yes", ten(("yes", 9), ("Yes", 1)), 1.0),  # not equal: normalised
    ("yes", ten(("yes", 9), ("yes.", 1)), 1.0),
    ("none", ten(("0", 9), ("1", 1)), 1.0),
]


@pytest.mark.parametrize(("prediction", "answers", "accuracy"), SCORED)
def test_vqa_accuracy_leaves_each_annotator_out_in_turn(prediction, answers, accuracy):
    assert vqa_accuracy(prediction, answers) == pytest.approx(accuracy, abs=1e-12)
    said, truths = prediction.replace("\t", " ").strip(), [a.strip() for a in answers]
    if len(set(truths)) > 1:
        said, truths = normalise(said), [normalise(t) for t in truths]
    others = [truths[:i] + truths[i + 1 :] for i in range(10)]
    assert accuracy == pytest.approx(sum(min(o.count(said) / 3, 1) for o in others) / 10)


def test_vqa_accuracy_refuses_answers_of_one_annotator():
    with pytest.raises(MetricError, match="ten annotators, found 1; use exact_match"):
        vqa_accuracy("yes", ["yes"])


def record(prediction, *answers, kind="", key="k", name="1"):
    return {
        "id": name,
        "key": key,
        "type": kind,
        "question": "?",
        "prediction": prediction,
        "answer": answers[0],
        "answers": list(answers),
        "correct": is_correct(prediction, answers),
    }


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


def test_anls_is_the_best_similarity_over_the_references_and_nothing_below_a_half():
    records = [
        record(p, *a)
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
    assert METRICS["anls"](records).per_sample() == pytest.approx([1, 1, 0.8, 0, 0.8, 0, 0.5])


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


def test_caption_tokens_are_words_in_lower_case_with_clitics_split_off():
    assert tokens("A man's T-shirt: \"don't\" cost 3.50, really?!") == "a man 's t-shirt do n't cost 3.50 really"
    assert tokens("It’s  a cafe\n") == "it 's a cafe" and tokens("?!") == ""


def test_bleu_is_the_bleu4_of_cocos_evaluation():
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for caption, references in zip(CAPTIONS, REFERENCES, strict=True):
        scorer += (tokens(caption), [tokens(r) for r in references])
    want = scorer.compute_score(option="closest", verbose=0)[0][3]
    got = figure(bleu(CAPTIONS, REFERENCES), list("abcdef"))
    assert got["value"] == pytest.approx(want, rel=1e-6) and 0.2 < want < 0.9
    assert got["low"] <= got["value"] <= got["high"] <= 1 and got["low"] < got["high"]


def test_bleu_by_hand():
    """ "a b c d e" against "a b c d f": precisions 4/5, 3/4, 2/3, 1/2; and one word short, exp(1 - 5/4)."""
    assert bleu(["a b c d e"], [["a b c d f"]]).per_sample() == pytest.approx([(4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25])
    assert bleu(["a b c d"], [["a b c d f"]]).per_sample() == pytest.approx([math.exp(-0.25)])


def test_rouge_l_by_hand():
    """Longest common subsequence "a c d" of 4 and 5 words; F with beta 1.2."""
    precision, recall = 3 / 4, 3 / 5
    assert rouge_l(["a b c d", "x", ""], [["a c e d f"], ["x"], ["y"]]).per_sample() == pytest.approx(
        [(1 + 1.44) * precision * recall / (recall + 1.44 * precision), 1, 0]
    )


def test_cider_by_hand():
    """Unit vectors of one n-gram each: only unigrams and bigrams exist, so a perfect caption scores 10 x 2 / 4; words
    all images share count 0.
    """
    assert cider(["red bus", "blue car"], [["red bus"], ["blue car"]]).per_sample() == pytest.approx([5, 5])
    assert cider(["red bus", "red bus"], [["red bus"], ["blue car"]]).per_sample() == pytest.approx([5, 0])
    assert cider(["the bus", "the car"], [["the"], ["the"]]).per_sample() == pytest.approx([0, 0]), (
        "the is in every image"
    )
    with pytest.raises(MetricError, match="no reference caption has a word"):
        cider(["a"], [["?"]])


def test_measure_gives_each_metric_by_type_and_says_why_one_is_missing():
    records = [
        record("yes", *ten(("yes", 3), ("no", 7)), kind="yes/no", key="a"),
        record("2", *ten(("two", 5), ("2", 5)), kind="number", key="b"),
    ]
    records.append(record("red", *ten(("blue", 10)), key="b"))
    figures, skipped = measure(records, ["exact_match", "vqa_accuracy"])
    assert not skipped and list(figures) == ["exact_match", "vqa_accuracy"]
    values = {kind: (f["value"], f["samples"]) for kind, f in figures["vqa_accuracy"].items()}
    assert values == {"overall": (pytest.approx(1.9 / 3), 3), "yes/no": (pytest.approx(0.9), 1), "number": (1.0, 1)}
    figures, skipped = measure([record("a", "a")], ["vqa_accuracy", "exact_match"])
    assert list(figures) == ["exact_match"] and "ten annotators" in skipped["vqa_accuracy"]
    assert measure([], ["exact_match"]) == ({}, {})


def test_the_config_names_the_metrics_there_are():
    assert set(get_args(Metric)) == set(METRICS) and EvalConfig().metrics == ("exact_match",)
    assert load_config(None, ["evaluate.metrics=[cider,bleu]"]).evaluate.metrics == ("cider", "bleu")


def test_kept_predictions_are_scored_again_without_decoding(tmp_path):
    kept = [
        {"id": str(n), "key": f"k{n}", "type": "t", "question": "q", "answer": "a", "answers": ten(("a", 3), ("b", 7))}
        for n in range(4)
    ]
    for step, text in ((300, "a"), (20, "c")):
        write_predictions(str(tmp_path), step, [score(r, text) for r in kept])
    (tmp_path / "predictions" / "images.parquet").touch()
    assert prediction_steps(str(tmp_path)) == [20, 300] and prediction_steps(str(tmp_path / "none")) == []
    report = summarize(read_predictions(str(tmp_path), 300), ["vqa_accuracy"])
    assert report.metrics["vqa_accuracy"]["t"]["value"] == pytest.approx(0.9) and report.accuracy == {
        "overall": 1,
        "t": 1,
    }
    assert summarize([]).metrics == {} and summarize([]).accuracy == {}


def test_figures_are_printed_in_percent_and_cider_as_it_is():
    assert (
        shown("anls", 0.5) == "50.0 %"
        and shown("cider", 1.25) == "1.250"
        and shown("anls", -0.01, sign=True) == "-1.0 %"
    )
    assert interval("anls", {"value": 0.0, "low": -0.1, "high": 0.25, "samples": 3}, sign=True) == "-10.0 to +25.0 %"


def coverage(draw, truth, trials=300):
    """How often the interval of `draw(rng)` -> (values, keys) holds the truth."""
    rng = np.random.default_rng(7)
    inside = 0
    for _ in range(trials):
        values, keys = draw(rng)
        found = figure(Scores.mean(values), keys, resamples=400)
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
    got = figure(Scores.mean(values), keys, resamples=4000)
    assert got == figure(Scores.mean(values), keys, resamples=4000) and got["samples"] == 60
    groups = [np.flatnonzero(np.array(keys) == key) for key in sorted(set(keys))]
    plain = [
        values[np.concatenate([groups[i] for i in rng.integers(0, len(groups), len(groups))])].mean()
        for _ in range(4000)
    ]
    assert (got["low"], got["high"]) == pytest.approx(tuple(np.quantile(plain, [0.025, 0.975])), abs=0.01)
    assert figure(Scores.mean([1.0] * 5), list("abcde")) == {"value": 1.0, "low": 1.0, "high": 1.0, "samples": 5}
    with pytest.raises(MetricError, match="no prediction"):
        figure(Scores.mean([]), [])


def test_the_interval_of_bleu_is_that_of_resampled_corpora():
    from sacrebleu.metrics.bleu import BLEU

    rng = np.random.default_rng(1)
    words = np.array(list("abcdefg"))
    captions = [" ".join(rng.choice(words, 8)) for _ in range(40)]
    references = [[" ".join(w if rng.random() < 0.8 else "x" for w in c.split())] for c in captions]
    got = figure(bleu(captions, references), [str(n) for n in range(40)], resamples=4000)
    drawn = []
    for _ in range(500):
        rows = rng.integers(0, 40, 40)
        corpus = BLEU(tokenize="none", smooth_method="none").corpus_score(
            [captions[i] for i in rows], [[references[i][0] for i in rows]]
        )
        drawn.append(corpus.score / 100)
    assert (got["low"], got["high"]) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.025)
    assert got["high"] - got["low"] > 0.15
