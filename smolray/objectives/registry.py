"""The objective of a run, from the module that is named like its method.

In: a RunConfig. Out: an Objective.
"""

from dataclasses import replace
from importlib import import_module

from smolray.config import RunConfig
from smolray.objectives.base import Objective


def objective_of(config: RunConfig) -> Objective:
    """The Objective that `smolray/objectives/<method>.py` builds for the run."""
    module = import_module(f"smolray.objectives.{config.method}")
    built: Objective = module.objective(config)
    return replace(built, pairs=config.traits.pairs, embeds=config.traits.embeds)
