"""CIDEr-D of captions, as COCO's evaluation computes it."""

from collections.abc import Sequence

from smolray.evaluate.bootstrap import MetricError, SampleScores
from smolray.evaluate.metrics.caption_tokens import coco_module, tokens
from smolray.run.predictions import Prediction


def score(predictions: Sequence[Prediction]) -> SampleScores:
    """Mean of CIDEr-D, 0 to 10 (tables often print 100 times that).

    A word weighs the more, the fewer images have it in their references. Words in the references of all images count
    nothing, so values of different subsets cannot be compared, and a single image has 0.

    Raises MetricError without the package, or where no reference has a word.
    """
    scorer = coco_module("cider", "pycocoevalcap.cider.cider_scorer").CiderScorer()
    for prediction in predictions:
        scorer += (tokens(prediction["prediction"]), [tokens(answer) for answer in prediction["answers"]])
    if not any(counts for references in scorer.crefs for counts in references):
        raise MetricError("cider: no reference caption has a word")
    return SampleScores.mean(scorer.compute_score()[1])
