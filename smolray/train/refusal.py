"""A step that is refused because its loss or its gradient is not a number.

In: what is wrong, and the place in training. Out: one message, the same on every worker: the step, its samples, and the
newest good checkpoint.
"""

import math
from collections.abc import Sequence

import torch.distributed as dist

from smolray.config import RunConfig
from smolray.run import checkpoint
from smolray.train.collective import broadcast, gather

NAMED = 16  # samples named in the message


class NonFiniteStepError(RuntimeError):
    """The loss or the gradient of a step is nan or infinite; the optimizer has not stepped."""


def refused_step(
    config: RunConfig, what: str, step: int, place: str, ids: Sequence[str], own_loss: float = 0.0
) -> NonFiniteStepError:
    """The error of a refused step. Collective.

    Args:
        config: of the run, whose newest checkpoint is named.
        what: such as "the loss is nan".
        step: the number that the step would have had.
        place: the epoch and micro-batches.
        ids: of this worker's samples in the step; empty where they are not known.
        own_loss: this worker's part of the loss: where it is not finite, only such workers' samples are named.
    """
    found = gather((math.isfinite(own_loss), list(ids)))
    bad = [one for finite, own in found if not finite for one in own] or [one for _, own in found for one in own]
    samples = f"; samples {', '.join(bad[:NAMED])}" if bad else ""
    samples += f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""

    newest = broadcast(_newest(config) if dist.get_rank() == 0 else "")
    return NonFiniteStepError(
        f"{what} at step {step} ({place}{samples}); the optimizer has not stepped, and nothing is saved; {newest}; "
        "lower optimizer.learning_rate or look at the data"
    )


def _newest(config: RunConfig) -> str:
    found = checkpoint.latest(config.run_dir)
    if found is None:
        return "there is no checkpoint"
    return f"the newest good checkpoint is {found.uri}: `smolray resume {config.name}` continues there"
