"""A trial's cost is estimated on the GPUs of the cluster; a trial that fits into none is refused before it starts."""

from dataclasses import replace

from smolray.config import load_config
from smolray.planner.inventory import find_gpu
from smolray.planner.model_files import shape_of
from smolray.planner.statistics import DataStatistics
from smolray.tune.cost import estimate_cost


def priced(gpus, *overrides):
    config = load_config(None, ["model.path=random-2.2b", *overrides])
    shape = shape_of(config.model)
    return estimate_cost(
        config, shape, replace(DataStatistics.default(config, shape), samples=10_000), [find_gpu(c) for c in gpus]
    )


def test_a_trial_that_fits_costs_gpu_minutes():
    small, large = (
        priced(["rtx3090"], "model.path=random-256m"),
        priced(["rtx4090", "rtx3090"], "model.path=random-256m"),
    )
    assert small.lacks == large.lacks == "" and 0 < large.gpu_minutes < small.gpu_minutes, (
        "on the kind of GPU where it is cheapest"
    )
    twice = priced(["rtx3090"], "model.path=random-256m", "train.num_train_epochs=2")
    assert twice.gpu_minutes > 1.9 * small.gpu_minutes


def test_a_trial_that_fits_into_no_gpu_says_what_it_lacks():
    full = priced(["rtx3060", "rtx3090"], "engine.stage=1")
    assert "does not fit" in full.lacks and "lacks" in full.lacks and "rtx3090" in full.lacks
    assert priced(["rtx3060", "h100"], "engine.stage=1", "train.per_device_train_batch_size=1").lacks == "", (
        "one GPU that holds it is enough"
    )


def test_a_fraction_of_a_gpu_has_that_fraction_of_its_memory():
    assert priced(["rtx3090"], "model.path=random-256m").lacks == ""
    assert priced(["rtx3090"], "model.path=random-256m", "resources.gpus_per_worker=0.1").lacks


def test_without_cards_the_planner_has_no_say():
    assert priced([]) is None
