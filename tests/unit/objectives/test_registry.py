"""Every method has an objective in the module of its name, and the traits and the objective agree."""

import pytest

from smolray.config import METHODS, RunConfig
from smolray.data.collate import COLLATE
from smolray.objectives.registry import objective_of


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_an_objective_and_a_collate(method):
    config = RunConfig(method=method)
    objective = objective_of(config)
    assert callable(objective.loss) and objective.metrics
    assert (objective.pairs, objective.embeds) == (config.traits.pairs, config.traits.embeds)
    assert config.traits.collate in COLLATE


@pytest.mark.parametrize("method", METHODS)
def test_settings_that_may_change_midway_are_settings_of_the_run(method):
    record = RunConfig().model_dump()
    for key in METHODS[method].tunable_midway:
        section, name = key.split(".")
        assert name in record[section], key
