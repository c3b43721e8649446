"""VQA accuracy is that of the published program, quirks included."""

import pytest

from smolray.evaluate.bootstrap import MetricError
from smolray.evaluate.metrics.vqa_accuracy import CONTRACTIONS, normalise, vqa_accuracy
from tests.predictions import ten_answers

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
    ("yes", ten_answers(("no", 10)), 0.0),
    ("yes", ten_answers(("yes", 1), ("no", 9)), 0.3),
    ("yes", ten_answers(("yes", 2), ("no", 8)), 0.6),
    ("yes", ten_answers(("yes", 3), ("no", 7)), 0.9),
    ("yes", ten_answers(("yes", 4), ("no", 6)), 1.0),
    ("yes", ten_answers(("yes", 9), ("no", 1)), 1.0),
    ("no", ten_answers(("yes", 3), ("no", 7)), 1.0),
    ("", ten_answers(("yes", 3), ("no", 7)), 0.0),
    # where the answers differ, both sides are normalised
    ("Yes.", ten_answers(("yes", 9), ("no", 1)), 1.0),
    ("two", ten_answers(("2", 5), ("3", 5)), 1.0),
    ("2", ten_answers(("two", 2), ("Two", 1), ("3", 7)), 0.9),
    ("the dog", ten_answers(("dog", 1), ("a dog", 1), ("cat", 8)), 0.6),
    ("dont know", ten_answers(("don't know", 4), ("no", 6)), 1.0),
    ("1000", ten_answers(("1,000", 3), ("999", 7)), 0.9),
    ("t shirt", ten_answers(("t-shirt", 2), ("shirt", 8)), 0.6),
    ("a", ten_answers(("the", 4), ("b", 6)), 1.0),
    # where all are equal nothing is, but outer blanks, tabs and line breaks go
    ("yes", ten_answers(("yes", 10)), 1.0),
    ("Yes", ten_answers(("yes", 10)), 0.0),
    ("yes.", ten_answers(("yes", 10)), 0.0),
    ("two", ten_answers(("2", 10)), 0.0),
    ("1,000", ten_answers(("1,000", 10)), 1.0),
    ("1000", ten_answers(("1,000", 10)), 0.0),
    (" yes\n", ten_answers(("yes", 10)), 1.0),
    ("new\tyork", ten_answers(("new york", 10)), 1.0),
    ("yes", ten_answers(("yes", 9), (" yes", 1)), 1.0),  # equal once the blanks are gone
    ("Yes", ten_answers(("yes", 9), ("Yes", 1)), 1.0),  # not equal: normalised
    ("yes", ten_answers(("yes", 9), ("yes.", 1)), 1.0),
    ("none", ten_answers(("0", 9), ("1", 1)), 1.0),
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
