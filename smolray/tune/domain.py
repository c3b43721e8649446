"""The values that a search tries for one setting, checked against the types and limits of the run's config.

In: a dotted key and its entry in `search.space`. Out: a Domain.
"""

import difflib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from smolray.config import ConfigError, RunConfig

RANGES, LISTS = ("loguniform", "uniform", "int"), ("choice", "grid")
KINDS = (*RANGES, *LISTS)
# These settings are the same for all trials; otherwise their results could not be compared.
FIXED = (
    "name",
    "storage",
    "seed",
    "search",
    "resources",
    "evaluate",
    "data.train",
    "data.validation",
    "data.validation_fraction",
)
# These settings determine the shards, which all trials read.
SHARDED = tuple(
    f"data.{name}"
    for name in (
        "shards",
        "format",
        "columns",
        "prompt",
        "split",
        "revision",
        "max_samples",
        "max_bad_fraction",
        "max_image_pixels",
        "shard_bytes",
    )
)

Settings = dict[str, Any]  # of a trial, by dotted key


@dataclass(frozen=True)
class Domain:
    """The values of one key: a range for loguniform, uniform and int (`high` included), a list for choice and grid."""

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
        """The values to check for all others: each value of a list, both ends of a range."""
        if self.values:
            return self.values
        return (int(self.low), int(self.high)) if self.kind == "int" else (self.low, self.high)


def read_domain(config: RunConfig, key: str, written: dict[str, Any]) -> Domain:
    """The domain of a key as `search.space` writes it, such as {loguniform: [1e-5, 1e-3]}.

    Raises ConfigError where it is not a domain, or the config refuses one of its values.
    """
    where = f"search.space.{key} = {written!r}"
    kind, values = _kind_and_values(where, key, written)
    domain = _range(where, kind, values) if kind in RANGES else Domain(kind, values=tuple(values))
    accepted = tuple(_accepted(config, key, where, value) for value in domain.extremes)

    if kind in RANGES:
        if any(isinstance(value, bool) or not isinstance(value, int | float) for value in accepted):
            raise ConfigError(f"{where}: {key} takes no range of numbers; nearest: {{choice: [...]}}")
        if kind != "int" and all(isinstance(value, int) for value in accepted):
            nearest = f"{{int: [{domain.low:g}, {domain.high:g}]}}"
            raise ConfigError(f"{where}: {key} takes whole numbers; nearest: {nearest}")
        return domain

    if twice := [value for n, value in enumerate(accepted) if value in accepted[:n]]:
        raise ConfigError(f"{where}: {twice[0]!r} occurs twice; expected each value once")
    return Domain(kind, values=accepted)


def _kind_and_values(where: str, key: str, written: dict[str, Any]) -> tuple[str, list[Any]]:
    """Read kind and values. Raises ConfigError for a fixed key, an unknown kind, or values that are not a list."""
    if len(written) != 1:
        raise ConfigError(
            f"{where}: expected one kind of domain, such as {{loguniform: [1e-5, 1e-3]}}; allowed: {', '.join(KINDS)}"
        )
    (kind, values), *_ = written.items()

    if kind not in KINDS:
        near = difflib.get_close_matches(str(kind), KINDS, n=1, cutoff=0.4)
        nearest = f"; nearest: {near[0]}" if near else ""
        raise ConfigError(f"{where}: {kind!r} is no kind of domain; allowed: {', '.join(KINDS)}{nearest}")

    if _within(key, FIXED):
        raise ConfigError(
            f"{where}: {key} is the same for all trials, or they could not be compared; take it out of the space"
        )
    if _within(key, SHARDED):
        raise ConfigError(
            f"{where}: {key} shapes the shards, which are written once for all trials, so no trial would see it; "
            "take it out of the space, or run a search for each value"
        )

    if not isinstance(values, list) or not values:
        raise ConfigError(f"{where}: expected a list, {'[low, high]' if kind in RANGES else 'with at least one value'}")
    return kind, values


def _within(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _range(where: str, kind: str, values: list[Any]) -> Domain:
    try:  # YAML reads 1e-5 as text
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
    """The value as RunConfig reads it. Raises ConfigError where it refuses the value."""
    try:
        record = config.replace({key: value}).model_dump(mode="json")
    except ConfigError as error:
        raise ConfigError(f"{where}: the run refuses {error}") from None
    for part in key.split("."):
        record = record[part]
    return record
