"""Tune's schedulers: which trials are stopped early, or take over the weights of better ones.

In: the `search` section and the space. Out: a TrialScheduler, which counts time in reports.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler

from smolray.config import RunConfig
from smolray.tune.log import TrialRecord
from smolray.tune.space import Domain, Space, longest

HYPERBAND_BRACKETS = 3


def make_scheduler(config: RunConfig, space: Space, known: Sequence[TrialRecord] = ()) -> TrialScheduler:
    """The scheduler of `config.search`. It takes the reports of the `known` trials into account."""
    search = config.search
    assert search is not None
    goal: dict[str, Any] = {
        "metric": search.metric,
        "mode": "min" if search.metric == "loss" else "max",
        "time_attr": "report",
    }
    if search.scheduler == "none":
        return FIFOScheduler()
    if search.scheduler == "pbt":
        return PopulationBasedTraining(
            **goal,
            perturbation_interval=search.perturbation_interval,
            hyperparam_mutations={key: tune_domain(domain) for key, domain in space.items()},
            custom_explore_fn=Bounds(space),
            log_config=False,
        )

    last = longest(config, space)
    brackets = HYPERBAND_BRACKETS if search.scheduler == "hyperband" else 1
    while brackets > 1 and search.grace_period * search.reduction_factor ** (brackets - 1) > last:
        brackets -= 1  # a bracket whose first rung lies beyond the end would stop no trial
    scheduler = AsyncHyperBandScheduler(
        **goal,
        max_t=last + 1,  # one more than the last report: a trial ends by itself, with its result written
        grace_period=min(search.grace_period, last),
        reduction_factor=search.reduction_factor,
        brackets=brackets,
    )
    _replay(scheduler, known)
    return scheduler


class Bounds:
    """Clips the settings that population-based training has multiplied to the space."""

    def __init__(self, space: Space):
        self.space = space

    def __call__(self, settings: dict[str, Any]) -> dict[str, Any]:
        clipped = dict(settings)
        for key, domain in self.space.items():
            if not domain.values:
                value = min(max(clipped[key], domain.low), domain.high)
                clipped[key] = round(value) if domain.kind == "int" else value
        return clipped


def tune_domain(domain: Domain) -> Any:
    """A Domain in Tune's form. A perturbation moves from a value of a list to its neighbours."""
    if domain.values:
        return list(domain.values)
    if domain.kind == "int":
        return tune.randint(int(domain.low), int(domain.high) + 1)
    return (tune.loguniform if domain.kind == "loguniform" else tune.uniform)(domain.low, domain.high)


def _replay(scheduler: AsyncHyperBandScheduler, known: Sequence[TrialRecord]) -> None:
    """Replay the reports of earlier sessions, so that the rungs compare new trials with them."""
    controller: Any = None  # this scheduler does not use it
    for trial in known:
        past: Any = SimpleNamespace(trial_id=f"past-{trial.number}")
        scheduler.on_trial_add(controller, past)
        for report in trial.reports:
            scheduler.on_trial_result(controller, past, report)
        scheduler.on_trial_remove(controller, past)
