"""How many of the longest prompts an evaluation answers together, beside what training keeps on a GPU.

In: a planned candidate. Out: an EvaluationBatch.
"""

from dataclasses import dataclass

from smolray.config import RunConfig
from smolray.planner import assumptions as a
from smolray.planner.candidate import Candidate
from smolray.planner.decoding import decodes, prompt_bytes, token_bytes
from smolray.planner.shapes import DTYPE_BYTES, ModelShape


@dataclass(frozen=True)
class EvaluationBatch:
    """A batch of prompts on the GPU with the least room: of at most `tokens`, or `sequences` of the longest."""

    tokens: int
    longest: int
    sequences: int


def evaluation_batch(chosen: Candidate, config: RunConfig, shape: ModelShape, longest: int) -> EvaluationBatch | None:
    """The batch of an evaluation. None: this run answers no questions.

    Args:
        chosen: how the run trains.
        config: the run.
        shape: its model.
        longest: tokens of the longest sequence.
    """
    if not decodes(config):
        return None
    least = min(
        capacity - memory.kept - memory.evaluation
        for memory, capacity in zip(chosen.memory, chosen.capacity, strict=True)
    )
    free = least + prompt_bytes(config, shape.text, longest)
    tokens = max(int(a.DECODING_SHARE * free / token_bytes(shape.text, DTYPE_BYTES[config.model.dtype])), 0)
    return EvaluationBatch(tokens, longest, min(tokens // longest, config.evaluate.batch_size))
