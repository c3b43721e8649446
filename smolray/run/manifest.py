"""What a checkpoint says of itself: the manifest and the state, checked value by value.

In: JSON of a checkpoint folder, which anything may have damaged. Out: Progress and the size and hash of each file.
"""

import json
import math
import re
from dataclasses import dataclass, fields
from typing import Any


class CheckpointError(ValueError):
    """A checkpoint is torn, corrupted or of another run; the message names it and what is wrong."""


@dataclass(frozen=True)
class Progress:
    """Where training stands. `consumed`: micro-batches of `epoch` that have been trained."""

    step: int = 0
    epoch: int = 0
    consumed: int = 0
    samples: int = 0
    tokens: int = 0
    data: str = ""  # fingerprint of shards, index and plan: the order that `consumed` counts in


@dataclass(frozen=True)
class Manifest:
    """The progress and metrics of a checkpoint, and of each file its bytes and hash."""

    progress: Progress
    metrics: dict[str, float]
    files: dict[str, tuple[int, str]]


def parse_manifest(uri: str, data: bytes, required: set[str], allowed: set[str]) -> Manifest:
    """The manifest at `uri`. `required` and `allowed`: names of its files.

    Raises CheckpointError where a value is missing or of another type, or a file is none of a checkpoint.
    """
    record = _object(uri, data)
    metrics, files = record.get("metrics"), record.get("files")
    if not isinstance(metrics, dict) or not all(_is_number(value) for value in metrics.values()):
        raise CheckpointError(f"{uri} is damaged: expected numbers as metrics, found {str(metrics)[:80]}")
    if not isinstance(files, dict):
        raise CheckpointError(f"{uri} is damaged: it lists no files")
    if missing := sorted(required - files.keys()):
        raise CheckpointError(f"{uri} is damaged: it does not list {missing[0]}")
    if stray := sorted(files.keys() - allowed):
        raise CheckpointError(f"{uri} is damaged: it lists {stray[0]!r}, which is no file of a checkpoint")

    progress = parse_progress(uri, record.get("progress"))
    folder = uri.rsplit("/", 2)[-2]
    if re.fullmatch(r"step-\d{8,}", folder) and int(folder.removeprefix("step-")) != progress.step:
        raise CheckpointError(f"{uri} is damaged: it is of step {progress.step}, its folder is {folder}")
    return Manifest(progress, metrics, {name: _entry(uri, name, entry) for name, entry in files.items()})


def parse_state(uri: str, data: bytes) -> dict[str, Any]:
    """The state at `uri`: its optimizer_step, loss_scale, codes and progress. Raises CheckpointError."""
    record = _object(uri, data)
    step, scale = record.get("optimizer_step"), record.get("loss_scale")
    if not _is_count(step):
        raise CheckpointError(f"{uri} is damaged: expected a number as optimizer_step, found {str(step)[:80]}")
    if scale is not None and not (_is_number(scale) and math.isfinite(scale) and scale > 0):
        raise CheckpointError(f"{uri} is damaged: expected a number above 0 as loss_scale, found {str(scale)[:80]}")
    if not isinstance(record.get("codes"), bool):
        raise CheckpointError(f"{uri} is damaged: it does not say whether there are 8-bit moments")
    return record | {"progress": parse_progress(uri, record.get("progress"))}


def parse_progress(uri: str, record: Any) -> Progress:
    """A position in training. Raises CheckpointError where a number is missing or is none."""
    names = {field.name for field in fields(Progress)}
    if not isinstance(record, dict) or record.keys() != names:
        raise CheckpointError(f"{uri} is damaged: its progress has not the values {', '.join(sorted(names))}")
    wrong = [name for name, value in record.items() if not (type(value) is str if name == "data" else _is_count(value))]
    if wrong:
        raise CheckpointError(f"{uri} is damaged: progress.{wrong[0]} is {str(record[wrong[0]])[:80]}")
    return Progress(**record)


def _entry(uri: str, name: str, entry: Any) -> tuple[int, str]:
    if isinstance(entry, dict) and _is_count(entry.get("bytes")) and type(entry.get("blake2b")) is str:
        return entry["bytes"], entry["blake2b"]
    raise CheckpointError(f"{uri} is damaged: expected bytes and blake2b of {name}, found {str(entry)[:80]}")


def _object(uri: str, data: bytes) -> dict[str, Any]:
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, or no text at all
        raise CheckpointError(f"{uri} is damaged: {type(error).__name__}: {error}") from None
    if not isinstance(record, dict):
        raise CheckpointError(f"{uri} is damaged: expected an object, found a {type(record).__name__}")
    return record


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
