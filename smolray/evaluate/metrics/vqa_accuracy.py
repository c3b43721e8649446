"""VQA accuracy as the VQAv2 evaluation defines it: an answer is right as far as the ten annotators gave it.

In: predictions with the annotators' answers. Out: 0 to 1 for each. Source: https://visualqa.org/evaluation and
GT-Vision-Lab/VQA, vqaEval.py of March 2021; where the two differ the program is followed, since published results come
from it. Its quirks, all kept and tested:

- Where all annotators wrote the very same answer, nothing is normalised, not even case: "Yes" then misses ten times
  "yes".
- A punctuation mark becomes a blank, but is deleted wherever it stands in the text if it touches a blank anywhere
  ("a-b - c" -> "ab  c"), and so are all marks if the text has a comma between two digits ("1,000/day" -> "1000day").
  Apostrophes and colons stay.
- A full stop goes unless a digit follows: "3.5" and ".5" keep it, "5." loses it; only the first 32 of a text.
- "none" is 0; number words end with ten; numbers inside other words stay.
- A contraction gets its apostrophe back only where exactly one is missing ("couldnt've", not "couldntve"). Those with a
  capital (I'm, I've) never match, the text being lower case by then; "lets" and "shes" are not in the list;
  "somebody'd" loses its apostrophe instead of gaining one.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

from smolray.evaluate.bootstrap import MetricError, SampleScores
from smolray.run.predictions import Prediction

ARTICLES = frozenset(("a", "an", "the"))
COUNTING = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(n) for n, word in enumerate(COUNTING.split())} | {"none": "0"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
SPELLINGS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
    why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in SPELLINGS.split() for i, letter in enumerate(word) if letter == "'"
}
CONTRACTIONS["somebody'd"] = "somebodyd"

_DIGITS_AROUND_COMMA = re.compile(r"\d,\d")
_STOP = re.compile(r"\.(?!\d)")
_FEWEST = 4  # annotators; with fewer no answer could be wholly right


def score(predictions: Sequence[Prediction]) -> SampleScores:
    """The accuracy of each prediction. Raises MetricError with fewer than four reference answers."""
    return SampleScores.mean([vqa_accuracy(p["prediction"], p["answers"]) for p in predictions])


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Mean over the annotators of min(matches among the others / 3, 1): with ten of them 0, 0.3, 0.6, 0.9 or 1.

    Raises MetricError with fewer than four answers: the score would never reach 1.
    """
    if len(answers) < _FEWEST:
        raise MetricError(f"vqa_accuracy weighs the answers of ten annotators, found {len(answers)}; use exact_match")

    text, truths = _clean(prediction), [_clean(answer) for answer in answers]
    if len(set(truths)) > 1:
        text, truths = normalise(text), [normalise(truth) for truth in truths]
    count, matches = len(truths), truths.count(text)
    return (matches * min((matches - 1) / 3, 1) + (count - matches) * min(matches / 3, 1)) / count


@lru_cache(maxsize=1 << 16)
def normalise(text: str) -> str:
    """Lower case, no articles, digits for number words, contractions with their apostrophe, punctuation gone."""
    words = [NUMBERS.get(word, word) for word in _without_punctuation(text).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _without_punctuation(text: str) -> str:
    out, comma = text, _DIGITS_AROUND_COMMA.search(text) is not None
    for mark in PUNCTUATION:
        out = out.replace(mark, "" if comma or f"{mark} " in text or f" {mark}" in text else " ")
    return _STOP.sub("", out, count=32)


def _clean(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
