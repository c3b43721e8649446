"""YAML files and dotted overrides -> a checked RunConfig, and back."""

import re
from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import ValidationError

from smolray import storage
from smolray.config.errors import ConfigError, empty_value, explain, is_text, one_line
from smolray.config.parse import YamlError, parse_yaml
from smolray.config.recipes import config_file
from smolray.config.rules import faults
from smolray.config.schema import ALIASES, RENAMED, SHORTHANDS, RunConfig


def load_config(
    path: str | None = None, overrides: Sequence[str] = (), base: dict[str, Any] | None = None
) -> RunConfig:
    """Read, merge and validate the settings of a run.

    `path` is a YAML file (a path, a URI, or the name of a recipe). It is merged over `base`, and the dotted `key=value`
    overrides over both.

    Raises ConfigError with one line per fault. Combinations are checked by `check_run`, which is called here.
    """
    record = _merge({}, _with_current_names(base or {}))
    if path is not None:
        record = _merge(record, _with_current_names(read_settings(config_file(path))))
    for override in overrides:
        _apply_override(record, override)
    try:
        config = RunConfig.model_validate(record)
    except ValidationError as error:
        raise ConfigError(explain(RunConfig, error)) from None
    check_run(config)
    return config


def to_yaml(config: RunConfig) -> str:
    """The resolved run as YAML that `load_config` reads back to an equal RunConfig."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def check_run(config: RunConfig) -> None:
    """Refuse combinations that cannot work, all of them in one ConfigError."""
    if found := faults(config):
        raise ConfigError("\n".join(found))


def read_settings(path: str) -> dict[str, Any]:
    """The settings in a file as they stand there, unchecked. Raises ConfigError where it is no YAML of settings."""
    try:
        loaded = parse_yaml(storage.read_bytes(path).decode("utf-8"))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigError(f"config file {path} does not exist or is a folder") from error
    except (YamlError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} is not valid YAML: {error}") from error
    loaded = {} if loaded is None else loaded
    if not isinstance(loaded, dict):
        raise ConfigError(f"config file {path} holds a {type(loaded).__name__}, expected keys and values")
    return loaded


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Both, section by section; `above` wins."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(value, dict):
            old = {SHORTHANDS[key]: old} if key in SHORTHANDS and isinstance(old, str) else old
            merged[key] = _merge(old if isinstance(old, dict) else {}, value)
        else:
            merged[key] = value
    return merged


def _with_current_names(record: dict[str, Any]) -> dict[str, Any]:
    """The record with keys that have been renamed under their present names. Raises ConfigError where both stand."""
    for alias, key in ALIASES.items():
        if alias in record:
            record = _without_alias(record, alias, key.split("."))
    for old, new in RENAMED.items():
        section, key = old.split(".")
        settings = record.get(section)
        if not isinstance(settings, dict) or key not in settings:
            continue
        current = new.split(".")[1]
        if current in settings:
            raise ConfigError(f"{old} is the earlier name of {new}, and both are given; leave {old} out")
        record = record | {section: {current if k == key else k: value for k, value in settings.items()}}
    return record


def _without_alias(record: dict[str, Any], alias: str, path: list[str]) -> dict[str, Any]:
    """The record with the value of an alias under its key here. Raises ConfigError where both stand."""
    rest = {key: value for key, value in record.items() if key != alias}
    *parents, last = path
    section = rest.get(parents[0]) if parents else rest
    if isinstance(section, dict) and last in section:
        raise ConfigError(f"{alias} is TRL's name of {'.'.join(path)}, and both are given; leave {alias} out")
    if not parents:
        return rest | {last: record[alias]}
    return rest | {parents[0]: {**(section if isinstance(section, dict) else {}), last: record[alias]}}


def _apply_override(record: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise ConfigError(
            f"{one_line(override)} is not an override: expected dotted.key=value, such as optimizer.learning_rate=1e-4"
        )

    key = RENAMED.get(key, ALIASES.get(key, key))
    try:
        value = parse_yaml(text)
    except YamlError as error:
        if not is_text(RunConfig, key.split(".")):
            raise ConfigError(f"{key} = {one_line(text)} is not a YAML value: {error}") from error
        value = text
    if not text.strip():
        value = empty_value(RunConfig, key.split("."))
    if value is not None and not isinstance(value, str | list) and is_text(RunConfig, key.split(".")):
        value = text  # name=2024, revision=1234567 or data.prompt=Answer: yes or no

    *parents, last = key.split(".")
    for parent in parents:
        child = record.get(parent)
        if isinstance(child, str) and parent in SHORTHANDS:
            child = {SHORTHANDS[parent]: child}
        record[parent] = child = dict(child) if isinstance(child, dict) else {}
        record = child
    record[last] = value
