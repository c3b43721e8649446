"""Preference accuracy: the share of pairs whose chosen answer the model finds more probable than the rejected one.

In: a model and packed Batches of pairs. Out: a Figure with its interval, over all and by question type.
Log-probabilities are summed over the answer, as in DPO; the reference model has no say, so a model can be measured
before it is trained.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from smolray.data.batch import Batch
from smolray.evaluate.bootstrap import Scores, figure
from smolray.evaluate.metrics import Figures, by_type
from smolray.model.forward import target_states
from smolray.model.load import base_model
from smolray.objectives.base import completion_logps
from smolray.run.predictions import Record


@torch.no_grad()
def margins(model: nn.Module, batches: Iterable[Batch], device: torch.device) -> dict[str, float]:
    """Log-probability of the chosen answer less that of the rejected one, by the id of the pair.

    Collective: all receive those of all.
    """
    mine: dict[str, float] = {}
    for batch in batches:
        batch = batch.to(device)
        logps = completion_logps(base_model(model).lm_head, target_states(model, batch), batch)
        mine |= dict(zip(batch.meta["ids"], (logps[0::2] - logps[1::2]).tolist(), strict=True))
    parts: list[dict[str, float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return {name: margin for part in parts for name, margin in part.items()}


def preference(found: dict[str, float], records: Sequence[Record]) -> Figures:
    """The figures of `margins`; `records` tell question type and image of each id, and those without a margin are left
    out.
    """
    compared = [record for record in records if record["id"] in found]
    if not compared:
        return {}
    scores = Scores.mean([found[record["id"]] > 0 for record in compared])
    keys = np.array([record["key"] for record in compared], object)
    return {kind: figure(scores.take(rows), keys[rows]) for kind, rows in by_type(compared).items()}
