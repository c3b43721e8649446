"""Words of captions, for the metrics of COCO's evaluation: BLEU-4, ROUGE-L and CIDEr over several references.

The definitions are the libraries': sacrebleu, and the two scorers of pycocoevalcap that are plain Python (its
tokenizer, METEOR and SPICE need Java and are not used).

`tokens` takes the place of COCO's Penn Treebank tokenizer: lower case, clitics split off ("don't" -> do n't),
punctuation dropped. On plain captions both agree; abbreviations and symbols may differ, which changes a metric in its
third digit.
"""

import re
from importlib import import_module
from typing import Any

from smolray.evaluate.bootstrap import missing_package

_WORD = re.compile(r"n't\b|'(?:s|re|ve|ll|d|m)\b|\w+(?=n't\b)|\w+(?:[-.,/:]\w+)*")


def tokens(text: str) -> str:
    """A caption as words with one blank between them."""
    return " ".join(_WORD.findall(text.lower().replace("’", "'")))


def coco_module(metric: str, module: str) -> Any:
    """A module of pycocoevalcap. Raises MetricError where it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        raise missing_package(metric, "pycocoevalcap") from error
