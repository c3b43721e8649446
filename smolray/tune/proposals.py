"""What to try next: random draws, a grid, or Optuna's TPE.

In: a space and what the trials so far have reached. Out: settings by trial number.

A resumed search proposes the same: draws follow the seed and the trial's number, Optuna is told of the trials in the
log.
"""

import itertools
import json
import random
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

from smolray.config import RunConfig
from smolray.tune.log import WORST, TrialRecord
from smolray.tune.space import Domain, Settings, Space, combinations, total_trials


class Searcher(Protocol):
    """Settings for a trial, and the ears for what became of it."""

    def suggest(self, number: int) -> Settings: ...

    def learn(self, trial: TrialRecord) -> None: ...


def make_searcher(config: RunConfig, space: Space, known: Sequence[TrialRecord] = ()) -> Searcher:
    """The algorithm of `config.search`, which has learnt from the `known` trials."""
    assert config.search is not None
    searcher = OptunaSearcher(config, space) if config.search.algorithm == "optuna" else Listed(config, space)
    for trial in known:
        if trial.ended:
            searcher.learn(trial)
    return searcher


class Listed:
    """Random draws or a grid, all known beforehand."""

    def __init__(self, config: RunConfig, space: Space):
        assert config.search is not None
        if config.search.algorithm == "grid":
            self.settings = [
                dict(zip(space, values, strict=True))
                for values in itertools.product(*(d.values for d in space.values()))
            ]
        else:
            grid = combinations(space)
            domains = {key: domain for key, domain in space.items() if domain.kind != "grid"}
            self.settings = []
            for number in range(total_trials(config, space)):
                rng = random.Random(f"{config.seed}/{number // len(grid)}")
                drawn = {key: domain.sample(rng) for key, domain in domains.items()} | grid[number % len(grid)]
                self.settings.append({key: drawn[key] for key in space})

    def suggest(self, number: int) -> Settings:
        return self.settings[number - 1]

    def learn(self, trial: TrialRecord) -> None:
        """A list does not listen."""


class OptunaSearcher:
    """Optuna's TPE sampler; with a second objective it looks for the front of both."""

    def __init__(self, config: RunConfig, space: Space):
        assert config.search is not None
        self.search, self.space = config.search, space
        self.study = new_study(config, total_trials(config, space))
        self.distributions = {key: distribution(domain) for key, domain in space.items()}
        self.asked: dict[int, Any] = {}
        self.heaviest = 1.0

    def suggest(self, number: int) -> Settings:
        trial = self.asked[number] = self.study.ask(self.distributions)
        return {key: _read(domain, trial.params[key]) for key, domain in self.space.items()}

    def learn(self, trial: TrialRecord) -> None:
        """A trial that failed counts as the worst there can be."""
        values = [v if (v := trial.value(self.search.metric)) is not None else WORST[self.search.metric]]
        if self.search.second_objective:
            second = trial.second(self.search.second_objective) if trial.status != "failed" else None
            self.heaviest = max(self.heaviest, second or 0.0)
            values.append(self.heaviest if second is None else second)
        if (asked := self.asked.pop(trial.number, None)) is not None:
            self.study.tell(asked, values)
        elif (past := past_trial(self.space, trial, values)) is not None:
            self.study.add_trial(past)


def new_study(config: RunConfig, trials: int) -> Any:
    """An Optuna study in memory with the directions of `config.search`."""
    import optuna

    assert config.search is not None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directions: Any = ["maximize" if config.search.metric == "accuracy" else "minimize"] + ["minimize"] * bool(
        config.search.second_objective
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # A third of the trials at random, then TPE; running trials count as bad, so that two at a time do not try the
        # same.
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=min(10, max(3, trials // 3)), constant_liar=True, seed=config.seed
        )
        return optuna.create_study(directions=directions, sampler=sampler)


def past_trial(space: Space, trial: TrialRecord, values: Sequence[float]) -> Any:
    """A trial of the log for an Optuna study; None where its settings are not of this space."""
    import optuna

    if set(trial.settings) != set(space):
        return None
    params = {key: _write(domain, trial.settings[key]) for key, domain in space.items()}
    return optuna.trial.create_trial(
        params=params, distributions={k: distribution(d) for k, d in space.items()}, values=list(values)
    )


def distribution(domain: Domain) -> Any:
    """A Draw in Optuna's words. Lists are categories by their JSON: Optuna wants plain values."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if domain.values:
        return CategoricalDistribution([json.dumps(value) for value in domain.values])
    if domain.kind == "int":
        return IntDistribution(int(domain.low), int(domain.high))
    return FloatDistribution(domain.low, domain.high, log=domain.kind == "loguniform")


def _read(domain: Domain, value: Any) -> Any:
    return json.loads(value) if domain.values else value


def _write(domain: Domain, value: Any) -> Any:
    return json.dumps(value) if domain.values else value
