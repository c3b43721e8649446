"""Preference accuracy: the fraction of pairs whose chosen answer the model finds more probable than the rejected one.

In: a model and packed Batches of pairs. Out: a Figure with its interval, over all and by question type.
Log-probabilities of an answer are summed over its tokens or their mean, as the method's loss compares them. No
reference model takes part, so a model can be measured before it is trained.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import nn

from smolray.data.batch import Batch
from smolray.evaluate.bootstrap import Estimates, SampleScores
from smolray.evaluate.measure import estimates_by_type
from smolray.model.forward import target_states
from smolray.model.load import base_model
from smolray.objectives.base import completion_logps
from smolray.run.predictions import Prediction


@torch.no_grad()
def margins(model: nn.Module, batches: Iterable[Batch], device: torch.device, mean: bool = False) -> dict[str, float]:
    """Log-probability of the chosen answer less that of the rejected one, by the id of the pair.

    Collective: all receive those of all.
    """
    mine: dict[str, float] = {}
    for batch in batches:
        batch = batch.to(device)
        logps = completion_logps(base_model(model).lm_head, target_states(model, batch), batch, mean)
        mine |= dict(zip(batch.meta["ids"], (logps[0::2] - logps[1::2]).tolist(), strict=True))
    parts: list[dict[str, float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return {name: margin for part in parts for name, margin in part.items()}


def preference(found: dict[str, float], predictions: Sequence[Prediction]) -> Estimates:
    """The preference accuracy by question type.

    `found`: `margins`. `predictions` tell question type and image of each id; those without a margin are left out.
    """
    compared = [prediction for prediction in predictions if prediction["id"] in found]
    if not compared:
        return {}
    return estimates_by_type(SampleScores.mean([found[p["id"]] > 0 for p in compared]), compared)
