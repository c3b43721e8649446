"""The schedulers that Tune runs are those of `search`, and know what earlier sessions have seen."""

from types import SimpleNamespace

import pytest
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from smolray.config import load_config
from smolray.tune.log import TrialRecord
from smolray.tune.scheduler import Bounds, make_scheduler, tune_domain
from smolray.tune.space import read_space

RATE, SIZE, FACTOR = "optimizer.learning_rate", "optimizer.adam_beta1", "optimizer.warmup_steps"
SPACE = {RATE: {"loguniform": [1e-5, 1e-2]}, SIZE: {"choice": [0.8, 0.9, 0.95]}, FACTOR: {"int": [0, 100]}}


def searched(**search):
    base = {"data": {"train": "a", "validation": "b"}, "train": {"num_train_epochs": 9}}
    return load_config(None, base={**base, "search": {"space": SPACE, "algorithm": "random", **search}})


def known_trial(number, accuracies):
    reports = [{"report": n, "run": "r", "accuracy": value} for n, value in enumerate(accuracies, 1)]
    return TrialRecord(number, "r", {}, status="finished", reports=reports)


def decision(scheduler, accuracy, report=1):
    trial = SimpleNamespace(trial_id="new")
    scheduler.on_trial_add(None, trial)
    return scheduler.on_trial_result(None, trial, {"report": report, "accuracy": accuracy})


def test_asha_measures_new_trials_against_those_of_earlier_sessions():
    config = searched(scheduler="asha", reduction_factor=3)
    space = read_space(config)
    known = [known_trial(n, [0.5 + n / 100]) for n in range(6)]
    assert decision(make_scheduler(config, space), 0.1) == TrialScheduler.CONTINUE, "the first of all"
    assert decision(make_scheduler(config, space, known), 0.1) == TrialScheduler.STOP
    assert decision(make_scheduler(config, space, known), 0.9) == TrialScheduler.CONTINUE


@pytest.mark.parametrize(("grace", "brackets"), [(1, 3), (2, 2), (9, 1)])
def test_no_bracket_begins_after_the_last_report(grace, brackets):
    config = searched(scheduler="hyperband", reduction_factor=3, grace_period=grace)
    assert len(make_scheduler(config, read_space(config))._brackets) == brackets


def test_without_a_scheduler_every_trial_runs_to_its_end():
    config = searched(scheduler="none")
    assert isinstance(make_scheduler(config, read_space(config)), FIFOScheduler)


def test_what_a_population_multiplies_stays_in_the_space():
    space = read_space(searched(scheduler="pbt"))
    clipped = Bounds(space)({RATE: 0.5, SIZE: 0.9, FACTOR: 119.6, "number": 3})
    assert clipped == {RATE: 1e-2, SIZE: 0.9, FACTOR: 100, "number": 3}
    assert Bounds(space)({RATE: 1e-9, SIZE: 0.8, FACTOR: 40.4})[FACTOR] == 40


def test_a_domain_of_tune_has_the_same_limits():
    space = read_space(searched())
    assert tune_domain(space[SIZE]) == [0.8, 0.9, 0.95]
    whole, rate = tune_domain(space[FACTOR]), tune_domain(space[RATE])
    assert (whole.lower, whole.upper) == (0, 101), "Tune's upper end is excluded"
    assert (rate.lower, rate.upper) == (1e-5, 1e-2)
