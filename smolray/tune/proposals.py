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
from smolray.tune.space import Draw, Settings, Space, combinations, total_trials


class Proposer(Protocol):
    """Settings for a trial, and the ears for what became of it."""

    def propose(self, number: int) -> Settings: ...

    def learn(self, trial: TrialRecord) -> None: ...


def make_proposer(config: RunConfig, space: Space, known: Sequence[TrialRecord] = ()) -> Proposer:
    """The algorithm of `config.search`, which has learnt from the `known` trials."""
    assert config.search is not None
    proposer = OptunaProposer(config, space) if config.search.algorithm == "optuna" else Listed(config, space)
    for trial in known:
        if trial.ended:
            proposer.learn(trial)
    return proposer


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
            draws = {key: draw for key, draw in space.items() if draw.kind != "grid"}
            self.settings = []
            for number in range(total_trials(config, space)):
                rng = random.Random(f"{config.seed}/{number // len(grid)}")
                drawn = {key: draw.sample(rng) for key, draw in draws.items()} | grid[number % len(grid)]
                self.settings.append({key: drawn[key] for key in space})

    def propose(self, number: int) -> Settings:
        return self.settings[number - 1]

    def learn(self, trial: TrialRecord) -> None:
        """A list does not listen."""


class OptunaProposer:
    """Optuna's TPE sampler; with a second objective it looks for the front of both."""

    def __init__(self, config: RunConfig, space: Space):
        assert config.search is not None
        self.search, self.space = config.search, space
        self.study = new_study(config, total_trials(config, space))
        self.distributions = {key: distribution(draw) for key, draw in space.items()}
        self.asked: dict[int, Any] = {}
        self.heaviest = 1.0

    def propose(self, number: int) -> Settings:
        trial = self.asked[number] = self.study.ask(self.distributions)
        return {key: _read(draw, trial.params[key]) for key, draw in self.space.items()}

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
    params = {key: _write(draw, trial.settings[key]) for key, draw in space.items()}
    return optuna.trial.create_trial(
        params=params, distributions={k: distribution(d) for k, d in space.items()}, values=list(values)
    )


def distribution(draw: Draw) -> Any:
    """A Draw in Optuna's words. Lists are categories by their JSON: Optuna wants plain values."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if draw.values:
        return CategoricalDistribution([json.dumps(value) for value in draw.values])
    if draw.kind == "int":
        return IntDistribution(int(draw.low), int(draw.high))
    return FloatDistribution(draw.low, draw.high, log=draw.kind == "loguniform")


def _read(draw: Draw, value: Any) -> Any:
    return json.loads(value) if draw.values else value


def _write(draw: Draw, value: Any) -> Any:
    return json.dumps(value) if draw.values else value
