"""The metrics that `evaluate.metrics` may name.

A new metric is one line here and one module `smolray/evaluate/metrics/<name>.py`, which computes it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal


@dataclass(frozen=True)
class MetricTraits:
    """What the rest of the code must know of a metric.

    Attributes:
        summary: one line for the description of the setting `evaluate.metrics`.
        percent: tables print it in percent.
        error_rate: 0 is perfect and lower is better; otherwise higher is better.
    """

    summary: str
    percent: bool = True
    error_rate: bool = False


METRICS: dict[str, MetricTraits] = {
    "exact_match": MetricTraits("equal to one of the reference answers, but for case"),
    "vqa_accuracy": MetricTraits("VQAv2: as far as the ten annotators gave the answer"),
    "anls": MetricTraits("DocVQA: 1 - edit distance / length, 0 below a half"),
    "token_f1": MetricTraits("SQuAD: overlap of words with the nearest reference"),
    "relaxed_accuracy": MetricTraits("ChartQA: numbers within 5 %"),
    "cer": MetricTraits("OCR: wrong characters / characters of the reference", error_rate=True),
    "bleu": MetricTraits("captions: BLEU-4"),
    "rouge_l": MetricTraits("captions: ROUGE-L"),
    "cider": MetricTraits("captions: CIDEr-D, 0 to 10", percent=False),
}

if TYPE_CHECKING:
    MetricName = str
else:
    MetricName = Literal[tuple(METRICS)]
