"""Which objective a run has: that of the module with its method's name.

In: a RunConfig. Out: an Objective.
"""

from dataclasses import replace
from importlib import import_module

from smolray.config import RunConfig
from smolray.objectives.base import Objective


def objective_of(config: RunConfig) -> Objective:
    """What `smolray/objectives/<method>.py` builds for the run."""
    module = import_module(f"smolray.objectives.{config.method}")
    built: Objective = module.objective(config)
    return replace(built, pairs=config.traits.pairs, embeds=config.traits.embeds)
