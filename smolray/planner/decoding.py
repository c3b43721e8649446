"""Bytes of decoding, for the planner and for the batches of an evaluation (evaluate/fit.py).

In: the sizes of a text model. Out: bytes of a prompt token, and of the longest prompt alone.
"""

from smolray.config import RunConfig
from smolray.planner import assumptions as a
from smolray.planner.shapes import DTYPE_BYTES, Text


def token_bytes(text: Text, size: int) -> int:
    """What a prompt token takes while it is decoded: its keys and values in all layers, and one layer's work.

    `size`: bytes of a value.
    """
    kept = 2 * text.num_layers * text.kv_heads * text.head_dim
    work = 8 * text.hidden + 3 * text.intermediate
    return size * (kept + work)


def decodes(config: RunConfig) -> bool:
    """Whether the run answers validation questions."""
    return config.data.evaluates and config.traits.evaluation == "answers"


def prompt_bytes(config: RunConfig, text: Text, longest: int) -> float:
    """Free bytes that an evaluation needs at least: for one sequence of the longest. 0 where nothing is decoded."""
    needed = longest * token_bytes(text, DTYPE_BYTES[config.model.dtype]) / a.DECODING_SHARE
    return needed if decodes(config) else 0.0
