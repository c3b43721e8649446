"""How many workers a cluster has room for, when its cards are looked at."""

import pytest

from smolray.config import load_config
from smolray.launch.resources import most_workers


@pytest.mark.parametrize(
    ("available", "overrides", "workers"),
    [
        ({"CPU": 16.0, "GPU": 3.0}, [], 3),
        ({"CPU": 3.0, "GPU": 8.0}, [], 2),
        ({"CPU": 16.0, "GPU": 3.0}, ["resources.use_gpu=no", "resources.num_workers=2"], 2),
        ({"CPU": 0.5}, [], 1),
    ],
)
def test_every_card_is_looked_at_and_as_many_processors_as_are_asked_for(available, overrides, workers):
    assert most_workers(load_config(None, ["model.dtype=float32", *overrides]), available) == workers
