"""Which settings to try next: random samples, a grid, or Optuna's TPE.

In: a space and the results of the trials so far. Out: settings by trial number.

A resumed search suggests the same settings: samples follow from the seed and the trial's number, and Optuna learns
again from the trials in the log.
"""

import itertools
import json
import random
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

from smolray.config import RunConfig
from smolray.tune.domain import Domain, Settings
from smolray.tune.log import WORST, TrialRecord
from smolray.tune.space import Space, combinations, total_trials


class Searcher(Protocol):
    """Suggests settings for trials and learns from their results."""

    def suggest(self, number: int) -> Settings:
        """The settings of the trial with this number, counted from 1."""
        ...

    def observe(self, trial: TrialRecord) -> None:
        """Learn from a trial that has ended."""
        ...


def make_searcher(config: RunConfig, space: Space, known: Sequence[TrialRecord] = ()) -> Searcher:
    """The Searcher of `config.search`. It learns from the `known` trials that have ended."""
    assert config.search is not None
    searcher = OptunaSearcher(config, space) if config.search.algorithm == "optuna" else FixedList(config, space)
    for trial in known:
        if trial.ended:
            searcher.observe(trial)
    return searcher


class FixedList:
    """Random samples or a grid: all settings are known beforehand."""

    def __init__(self, config: RunConfig, space: Space):
        assert config.search is not None
        if config.search.algorithm == "grid":
            products = itertools.product(*(domain.values for domain in space.values()))
            self.settings = [dict(zip(space, values, strict=True)) for values in products]
            return

        grid = combinations(space)
        domains = {key: domain for key, domain in space.items() if domain.kind != "grid"}
        self.settings = []
        for number in range(total_trials(config, space)):
            # the combinations of the grid share their samples
            rng = random.Random(f"{config.seed}/{number // len(grid)}")
            sampled = {key: domain.sample(rng) for key, domain in domains.items()} | grid[number % len(grid)]
            self.settings.append({key: sampled[key] for key in space})

    def suggest(self, number: int) -> Settings:
        return self.settings[number - 1]

    def observe(self, trial: TrialRecord) -> None:
        """Do nothing: the list does not change."""


class OptunaSearcher:
    """Optuna's TPE sampler. With a second objective it searches for the Pareto front of both."""

    def __init__(self, config: RunConfig, space: Space):
        assert config.search is not None
        self.search, self.space = config.search, space
        self.study = new_study(config, total_trials(config, space))
        self.distributions = {key: distribution(domain) for key, domain in space.items()}
        self.running: dict[int, Any] = {}  # Optuna's trials by number
        self.highest_cost = 1.0

    def suggest(self, number: int) -> Settings:
        trial = self.running[number] = self.study.ask(self.distributions)
        return {key: _from_optuna(domain, trial.params[key]) for key, domain in self.space.items()}

    def observe(self, trial: TrialRecord) -> None:
        """Pass the result to Optuna. A failed trial has the worst value and the highest cost so far."""
        value = trial.value(self.search.metric)
        values = [WORST[self.search.metric] if value is None else value]
        if self.search.second_objective:
            cost = trial.cost(self.search.second_objective) if trial.status != "failed" else None
            self.highest_cost = max(self.highest_cost, cost or 0.0)
            values.append(self.highest_cost if cost is None else cost)

        if (running := self.running.pop(trial.number, None)) is not None:
            self.study.tell(running, values)
        elif (past := past_trial(self.space, trial, values)) is not None:
            self.study.add_trial(past)


def new_study(config: RunConfig, trials: int) -> Any:
    """An Optuna study in memory with the directions of `config.search`."""
    import optuna

    assert config.search is not None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directions: Any = ["maximize" if config.search.metric == "accuracy" else "minimize"]
    if config.search.second_objective:
        directions.append("minimize")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # A third of the trials is random, then TPE suggests. Running trials count as bad (constant_liar), so that two
        # trials at a time do not try the same settings.
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=min(10, max(3, trials // 3)), constant_liar=True, seed=config.seed
        )
        return optuna.create_study(directions=directions, sampler=sampler)


def past_trial(space: Space, trial: TrialRecord, values: Sequence[float]) -> Any:
    """A trial of the log in Optuna's form. None where its settings do not belong to this space."""
    import optuna

    if set(trial.settings) != set(space):
        return None
    params = {key: _to_optuna(domain, trial.settings[key]) for key, domain in space.items()}
    return optuna.trial.create_trial(
        params=params, distributions={k: distribution(d) for k, d in space.items()}, values=list(values)
    )


def distribution(domain: Domain) -> Any:
    """A Domain in Optuna's form. Values of a list become JSON text, because Optuna takes plain values only."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if domain.values:
        return CategoricalDistribution([json.dumps(value) for value in domain.values])
    if domain.kind == "int":
        return IntDistribution(int(domain.low), int(domain.high))
    return FloatDistribution(domain.low, domain.high, log=domain.kind == "loguniform")


def _from_optuna(domain: Domain, value: Any) -> Any:
    return json.loads(value) if domain.values else value


def _to_optuna(domain: Domain, value: Any) -> Any:
    return json.dumps(value) if domain.values else value
