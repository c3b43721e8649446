"""The space of a search, checked against the config's types and limits before any trial starts.

In: a RunConfig with its `search` section. Out: a Domain for each dotted key, and the RunConfig of any settings sampled
from them. Pure.
"""

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

from smolray.config import METHODS, ConfigError, RunConfig, check_run
from smolray.tune.domain import Domain, Settings, read_domain

# Settings that may change in the middle of a run: they change neither tensor shapes nor the order of the data.
PERTURBED = (
    "optimizer.",
    "lora.lora_dropout",
    *(key for traits in METHODS.values() for key in traits.tunable_midway),
)
MAX_COMBINATIONS = 512  # of extreme values, tried against the run's rules
MAX_NAME = 48  # letters

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
        space |= {"lora.lora_dropout": {"uniform": [0.0, 0.1]}} if config.traits.tunes_dropout else {}
    return space


def read_space(config: RunConfig) -> Space:
    """The checked space of `config.search`.

    Raises ConfigError with one line for each fault: an unknown setting, an unknown kind of domain, an empty range, or a
    value or combination that the config refuses.
    """
    if config.search is None:
        raise ConfigError("search is not set: a search needs a section `search`, such as search={num_samples: 12}")

    faults: list[str] = []
    space: Space = {}
    for key, way in (config.search.space or default_space(config)).items():
        try:
            space[key] = read_domain(config, key, way)
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
    """Every combination of the values of the grid keys."""
    keys = [key for key, domain in space.items() if domain.kind == "grid"]
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*(space[key].values for key in keys))]


def total_trials(config: RunConfig, space: Space) -> int:
    """Trials of the search: each combination of the grid keys `num_samples` times, with algorithm grid once."""
    assert config.search is not None
    if config.search.algorithm == "grid":
        return math.prod(len(domain.values) for domain in space.values())
    return config.search.num_samples * len(combinations(space))


def longest(config: RunConfig, space: Space) -> int:
    """Reports of the longest trial: its epochs, in steps of evaluate.eval_epochs."""
    key = "train.num_train_epochs"
    epochs = max(int(v) for v in space[key].extremes) if key in space else config.train.num_train_epochs
    return math.ceil(epochs / (config.evaluate.eval_epochs or epochs))


def _against_algorithm(config: RunConfig, space: Space) -> Iterator[str]:
    """Yield a message for each setting that the algorithm, the scheduler or the metric cannot use."""
    search = config.search
    assert search is not None
    for key, domain in space.items():
        where = f"search.space.{key} ({domain.kind})"
        if search.algorithm == "grid" and not domain.values:
            yield (
                f"{where}: search.algorithm = grid tries every value of a list, and a range has no list; "
                "nearest: {choice: [...]}, or search.algorithm=random"
            )
        if search.algorithm == "optuna" and domain.kind == "grid":
            nearest = f"{{choice: {list(domain.values)}}}"
            yield f"{where}: search.algorithm = optuna chooses values itself; nearest: {nearest}"

    if search.scheduler == "pbt":
        yield from _against_population(config, space)
    elif search.scheduler != "none" and config.train.max_steps > 0:
        yield (
            f"train.max_steps = {config.train.max_steps} with search.scheduler = {search.scheduler}: its rungs are "
            "counted in epochs; nearest: search.scheduler=none, or train.num_train_epochs without max_steps"
        )

    if search.second_objective and search.algorithm != "optuna":
        yield (
            f"search.second_objective = {search.second_objective} with search.algorithm = {search.algorithm}: "
            "only optuna weighs two objectives; nearest: search.algorithm=optuna"
        )

    if search.metric == "accuracy" and not config.data.evaluates:
        yield (
            "search.metric = accuracy without data.validation: there is no data to measure it on; "
            "set data.validation, or search.metric=loss"
        )

    if len(config.name) > MAX_NAME:
        yield (
            f"name = {config.name!r}: trials are runs with the names {config.name}-1 and so on, "
            f"so the name of a search has at most {MAX_NAME} letters"
        )


def _against_population(config: RunConfig, space: Space) -> Iterator[str]:
    """A fault for each part that population-based training cannot use."""
    search = config.search
    assert search is not None
    allowed = ", ".join(f"{key}*" if key.endswith(".") else key for key in PERTURBED)
    for key, domain in space.items():
        if not key.startswith(PERTURBED):
            yield (
                f"search.space.{key} ({domain.kind}): search.scheduler = pbt changes settings in the middle of a run, "
                f"and this one fixes tensors or the order of the data; allowed: {allowed}"
            )
    if search.algorithm == "optuna":
        yield (
            "search.algorithm = optuna with search.scheduler = pbt: the population itself searches; "
            "nearest: search.algorithm=random"
        )

    if config.engine.name in ("trl", "auto"):
        reason = "begins anew instead of at a checkpoint"
        if config.engine.name == "auto":
            reason = "may plan other steps for each trial"
        yield (
            f"engine.name = {config.engine.name} with search.scheduler = pbt: it {reason}, "
            "so a trial cannot take over the weights of another; nearest: engine.name=zero, or search.scheduler=asha"
        )

    if total_trials(config, space) < 2:
        yield (
            "search.num_samples = 1 with search.scheduler = pbt: there is no other trial to take weights from; "
            "nearest: search.num_samples=4"
        )


def _combinations(config: RunConfig, space: Space) -> Iterator[str]:
    """Yield a message for each rule that a combination of extreme values breaks, with the first such combination."""
    keys: set[str] = set()
    for settings in _corners(space):
        try:
            trial_run(config, settings)
        except ConfigError as error:
            for line in str(error).splitlines():
                key = line.split(":")[0]
                if key not in keys:
                    keys.add(key)
                    combination = ", ".join(f"{name}={value}" for name, value in settings.items())
                    yield f"search.space: a trial with {combination} could not run: {line}"


def _corners(space: Space) -> Iterator[Settings]:
    """All combinations of extreme values; a random sample of them where there are too many."""
    choices: Sequence[tuple[Any, ...]] = [domain.extremes for domain in space.values()]
    if math.prod(len(c) for c in choices) <= MAX_COMBINATIONS:
        yield from (dict(zip(space, values, strict=True)) for values in itertools.product(*choices))
        return

    rng = random.Random(0)
    for _ in range(MAX_COMBINATIONS):
        yield {key: rng.choice(values) for key, values in zip(space, choices, strict=True)}
