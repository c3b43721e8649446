"""The space of a search, checked against the run's own types and limits before any trial starts.

In: a RunConfig with its `search` section. Out: a Draw for each dotted key, and the RunConfig of any settings drawn from
them. Pure.
"""

import difflib
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from smolray.config import ConfigError, RunConfig, check_run

RANGES, LISTS = ("loguniform", "uniform", "int"), ("choice", "grid")
KINDS = (*RANGES, *LISTS)
# what makes trials comparable
FIXED = ("name", "storage", "seed", "search", "resources", "evaluate", "data.train", "data.validation")
SHARDED = tuple(
    f"data.{name}"
    for name in (
        "shards",
        "format",
        "columns",
        "prompt",
        "split",
        "revision",
        "max_bad_fraction",
        "max_image_pixels",
        "shard_bytes",
    )
)
# What may change in the middle of a run: neither the shapes of its tensors nor the order of its data.
PERTURBED = ("optimizer.", "lora.lora_dropout", "dpo.beta", "dpo.label_smoothing", "dpo.loss_weights")
MAX_COMBINATIONS = 512  # combinations of extreme values tried against the run's rules

Settings = dict[str, Any]


@dataclass(frozen=True)
class Domain:
    """How values of one key are drawn: a range for loguniform, uniform and int (`high` included), `values` for choice
    and grid.
    """

    kind: str
    low: float = 0.0
    high: float = 0.0
    values: tuple[Any, ...] = ()

    def sample(self, rng: random.Random) -> Any:
        """One value at random."""
        if self.values:
            return rng.choice(self.values)
        if self.kind == "int":
            return rng.randint(int(self.low), int(self.high))
        if self.kind == "loguniform":
            return min(max(math.exp(rng.uniform(math.log(self.low), math.log(self.high))), self.low), self.high)
        return rng.uniform(self.low, self.high)

    @property
    def extremes(self) -> tuple[Any, ...]:
        """The values that stand for all: each of a list, both ends of a range."""
        if self.values:
            return self.values
        return (int(self.low), int(self.high)) if self.kind == "int" else (self.low, self.high)


Space = dict[str, Domain]


def default_space(config: RunConfig) -> dict[str, dict[str, list[Any]]]:
    """The ranges of the published SmolVLM recipes, as the YAML of `search.space`."""
    space: dict[str, dict[str, list[Any]]] = {
        "optimizer.learning_rate": {"loguniform": [2e-5, 5e-4]},
        "train.per_device_train_batch_size": {"choice": [4, 8, 16]},
        "train.num_train_epochs": {"int": [3, 5]},
        "optimizer.warmup_ratio": {"uniform": [0.0, 0.1]},
        "optimizer.weight_decay": {"uniform": [0.0, 0.1]},
        "image.longest_edge": {"choice": [512, 1024, 1536]},
    }
    if config.lora is not None:
        space |= {"lora.r": {"choice": [8, 16, 32]}, "lora.lora_alpha": {"choice": [8, 16, 32]}}
        space |= {"lora.lora_dropout": {"uniform": [0.0, 0.1]}} if config.method == "sft" else {}
    return space


def read_space(config: RunConfig) -> Space:
    """The checked space of `config.search`.

    Raises ConfigError with one line for each key that no trial could use: no setting of a run, not a way to draw, an
    empty range, a value or a combination that the config refuses.
    """
    if config.search is None:
        raise ConfigError("search is not set: a search needs a section `search`, such as search={num_samples: 12}")
    faults: list[str] = []
    space: Space = {}
    for key, way in (config.search.space or default_space(config)).items():
        try:
            space[key] = _read_domain(config, key, way)
        except ConfigError as error:
            faults.append(str(error))
    if not faults:
        faults = [*_against_algorithm(config, space), *_combinations(config, space)]
    if faults:
        raise ConfigError("\n".join(faults))
    return space


def trial_run(base: RunConfig, settings: Settings) -> RunConfig:
    """The run of a trial: `base` with the trial's settings, without the search section. Raises ConfigError."""
    run = base.replace({**settings, "search": None})
    check_run(run)
    return run


def combinations(space: Space) -> list[Settings]:
    """Every combination of the keys that are lists to go through: those of kind grid."""
    keys = [key for key, domain in space.items() if domain.kind == "grid"]
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*(space[key].values for key in keys))]


def total_trials(config: RunConfig, space: Space) -> int:
    """How many trials the search has: every combination of the grid keys, each `num_samples` times (algorithm grid:
    once).
    """
    assert config.search is not None
    if config.search.algorithm == "grid":
        return math.prod(len(domain.values) for domain in space.values())
    return config.search.num_samples * len(combinations(space))


def longest(config: RunConfig, space: Space) -> int:
    """Reports of the longest trial: its epochs, in steps of evaluate.eval_epochs."""
    key = "train.num_train_epochs"
    epochs = max(int(v) for v in space[key].extremes) if key in space else config.train.num_train_epochs
    return math.ceil(epochs / (config.evaluate.eval_epochs or epochs))


def _read_domain(config: RunConfig, key: str, way: dict[str, Any]) -> Domain:
    where = f"search.space.{key} = {way!r}"
    if len(way) != 1:
        raise ConfigError(
            f"{where}: expected one way to draw, such as {{loguniform: [1e-5, 1e-3]}}; allowed: {', '.join(KINDS)}"
        )
    (kind, values), *_ = way.items()
    if kind not in KINDS:
        near = difflib.get_close_matches(str(kind), KINDS, n=1, cutoff=0.4)
        raise ConfigError(
            f"{where}: {kind!r} is not a way to draw; allowed: {', '.join(KINDS)}{f'; nearest: {near[0]}' if near else ''}"
        )
    if _within(key, FIXED):
        raise ConfigError(
            f"{where}: {key} is the same for all trials, or they could not be compared; take it out of the space"
        )
    if _within(key, SHARDED):
        raise ConfigError(
            f"{where}: {key} shapes the shards, which are written once for all trials: no trial would see it; take it out of the space, "
            "or begin a search for each value"
        )
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{where}: expected a list, {'[low, high]' if kind in RANGES else 'with at least one value'}")
    domain = _range(where, kind, values) if kind in RANGES else Domain(kind, values=tuple(values))
    accepted = tuple(_accepted(config, key, where, value) for value in domain.extremes)
    if kind in RANGES:
        if any(isinstance(value, bool) or not isinstance(value, int | float) for value in accepted):
            raise ConfigError(f"{where}: {key} takes no range of numbers; nearest: {{choice: [...]}}")
        if kind != "int" and all(isinstance(value, int) for value in accepted):
            raise ConfigError(
                f"{where}: {key} takes whole numbers; nearest: {{int: [{domain.low:g}, {domain.high:g}]}}"
            )
        return domain
    if twice := [v for i, v in enumerate(accepted) if v in accepted[:i]]:
        raise ConfigError(f"{where}: {twice[0]!r} stands twice; expected each value once")
    return Domain(kind, values=accepted)


def _within(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _range(where: str, kind: str, values: list[Any]) -> Domain:
    try:  # YAML takes 1e-5 for text
        low, high = (float(v) for v in values if not isinstance(v, bool))
    except (TypeError, ValueError):
        raise ConfigError(f"{where}: expected two numbers, [low, high]") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(f"{where}: the range is empty; expected low < high, both finite")
    if kind == "loguniform" and low <= 0:
        raise ConfigError(f"{where}: low = {low:g} has no logarithm; expected low > 0; nearest: uniform")
    if kind == "int" and (low != int(low) or high != int(high)):
        raise ConfigError(f"{where}: expected two whole numbers; nearest: uniform")
    return Domain(kind, low, high)


def _accepted(config: RunConfig, key: str, where: str, value: Any) -> Any:
    """The value as the run's own model reads it. Raises ConfigError where it refuses it."""
    try:
        record = config.replace({key: value}).model_dump(mode="json")
    except ConfigError as error:
        raise ConfigError(f"{where}: the run refuses {error}") from None
    for part in key.split("."):
        record = record[part]
    return record


def _against_algorithm(config: RunConfig, space: Space) -> Iterator[str]:
    search = config.search
    assert search is not None
    for key, domain in space.items():
        where = f"search.space.{key} ({domain.kind})"
        if search.algorithm == "grid" and not domain.values:
            yield f"{where}: search.algorithm = grid goes through lists, a range has no end; nearest: {{choice: [...]}}, or search.algorithm=random"
        if search.algorithm == "optuna" and domain.kind == "grid":
            yield f"{where}: search.algorithm = optuna chooses by itself; nearest: {{choice: {list(domain.values)}}}"
        if search.scheduler == "pbt" and not key.startswith(PERTURBED):
            yield (
                f"{where}: search.scheduler = pbt changes settings in the middle of a run, and this one fixes tensors or the order of the data; "
                f"allowed: {', '.join(p + '*' if p.endswith('.') else p for p in PERTURBED)}"
            )
    if search.scheduler == "pbt" and search.algorithm == "optuna":
        yield "search.algorithm = optuna with search.scheduler = pbt: the population itself is the search; nearest: search.algorithm=random"
    if search.scheduler == "pbt" and config.engine.name in ("trl", "auto"):
        reason = (
            "begins anew instead of at a checkpoint"
            if config.engine.name == "trl"
            else "may plan other steps for each trial"
        )
        yield (
            f"engine.name = {config.engine.name} with search.scheduler = pbt: it {reason}, so a trial cannot take over the weights of another; "
            "nearest: engine.name=zero, or search.scheduler=asha"
        )
    if search.scheduler == "pbt" and total_trials(config, space) < 2:
        yield "search.num_samples = 1 with search.scheduler = pbt: nobody to learn from; nearest: search.num_samples=4"
    if search.second_objective and search.algorithm != "optuna":
        yield f"search.second_objective = {search.second_objective} with search.algorithm = {search.algorithm}: only optuna weighs two; nearest: optuna"
    if search.metric == "accuracy" and not config.data.validation:
        yield "search.metric = accuracy without data.validation: there is nothing to measure it on; set data.validation, or search.metric=loss"
    if len(config.name) > 48:
        yield f"name = {config.name!r}: trials are runs called {config.name}-1 and so on, so a search has at most 48 letters"


def _combinations(config: RunConfig, space: Space) -> Iterator[str]:
    """A fault for each rule that some combination of extreme values breaks."""
    told: set[str] = set()
    for settings in _corners(space):
        try:
            trial_run(config, settings)
        except ConfigError as error:
            for line in str(error).splitlines():
                if line.split(":")[0] not in told:
                    told.add(line.split(":")[0])
                    yield f"search.space: a trial with {', '.join(f'{k}={v}' for k, v in settings.items())} could not run: {line}"


def _corners(space: Space) -> Iterator[Settings]:
    choices: Sequence[tuple[Any, ...]] = [domain.extremes for domain in space.values()]
    if math.prod(len(c) for c in choices) <= MAX_COMBINATIONS:
        yield from (dict(zip(space, values, strict=True)) for values in itertools.product(*choices))
        return
    rng = random.Random(0)
    for _ in range(MAX_COMBINATIONS):
        yield {key: rng.choice(values) for key, values in zip(space, choices, strict=True)}
