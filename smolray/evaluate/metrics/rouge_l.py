"""ROUGE-L of captions, as COCO's evaluation computes it."""

from collections.abc import Sequence

from smolray.evaluate.bootstrap import SampleScores
from smolray.evaluate.metrics.caption_tokens import coco_module, tokens
from smolray.run.predictions import Prediction


def score(predictions: Sequence[Prediction]) -> SampleScores:
    """Mean of ROUGE-L (F with beta 1.2; best precision and best recall over the references), 0 to 1.

    Raises MetricError without the package.
    """
    scorer = coco_module("rouge_l", "pycocoevalcap.rouge.rouge").Rouge()
    values = []
    for prediction in predictions:
        caption = tokens(prediction["prediction"])
        references = [tokens(answer) for answer in prediction["answers"]]
        values.append(scorer.calc_score([caption], references) if caption else 0.0)
    return SampleScores.mean(values)
