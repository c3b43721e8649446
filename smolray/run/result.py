"""The summary that a run writes at its end, `<run>/result.json`.

In: the folder of a run. Out: what the file holds, or one message where something has damaged it.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from smolray import storage
from smolray.run.folder import RunFolder


class RunFileError(ValueError):
    """A file of a run's folder is damaged; the message names it and the remedy."""


def read_result(run_dir: str) -> dict[str, Any]:
    """What result.json holds; empty where there is none. Raises RunFileError."""
    uri = RunFolder(run_dir).result
    try:
        data = storage.read_bytes(uri)
    except FileNotFoundError:
        return {}
    except OSError as error:  # such as a folder of that name
        raise RunFileError(_damaged(run_dir, uri, str(error))) from None

    try:
        result = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RunFileError(_damaged(run_dir, uri, f"no JSON ({error})" if data else "empty")) from None
    if not isinstance(result, dict) or not isinstance(result.get("status", ""), str):
        raise RunFileError(_damaged(run_dir, uri, "no object of results"))
    return result


@contextmanager
def reading(run_dir: str) -> Iterator[None]:
    """A block that reads the log and the result of a run.

    A line or value in them that something has damaged, and that is valid JSON nevertheless, is a RunFileError there;
    `--debug` shows where.
    """
    try:
        yield
    except RunFileError:
        raise
    except (LookupError, TypeError, AttributeError) as error:
        folder = RunFolder(run_dir)
        raise RunFileError(
            f"{folder.events} or {folder.result} is damaged: {type(error).__name__}: {error}. The checkpoints have "
            f"hashes of their own: `smolray resume {folder.name}` goes on from the newest whole one"
        ) from error


def _damaged(run_dir: str, uri: str, found: str) -> str:
    base, name = run_dir.rstrip("/").rsplit("/", 1) if "/" in run_dir.rstrip("/") else (".", run_dir)
    return (
        f"{uri} is damaged: it is {' '.join(found.split())[:200]}; expected the summary of a run. "
        f"Delete it, and `smolray resume {name} --storage {base}` writes it again from the newest checkpoint"
    )
