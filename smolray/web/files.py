"""Folders of runs by names that come from a browser. No name leads out of the storage folder.

In: a name. Out: the folder of that run, or NotFoundError.
"""

from pathlib import Path

from smolray import storage
from smolray.run.folder import RunFolder


class NotFoundError(ValueError):
    """There is nothing of that name."""


def is_name(name: str) -> bool:
    """Whether a name is that of one folder: no path."""
    return bool(name) and name not in (".", "..") and not set(name) & {"/", "\\", "\0"}


def is_inside(root: str, uri: str) -> bool:
    """Whether a place is below `root`, also when links are followed."""
    if not storage.is_local(root):
        return uri.startswith(storage.join(root, ""))
    return Path(storage.absolute(uri)).resolve().is_relative_to(Path(storage.absolute(root)).resolve())


def run_folder(root: str, name: str) -> RunFolder:
    """The folder of a run. Raises NotFoundError."""
    folder = RunFolder(storage.join(root, name)) if is_name(name) else None
    if folder is None or not folder.is_run() or not is_inside(root, folder.uri):
        raise NotFoundError(f"there is no run {name[:100]!r} here")
    return folder


def read_inside(root: str, uri: str) -> bytes:
    """A file below `root`. Raises NotFoundError where there is none."""
    try:
        if is_inside(root, uri):
            return storage.read_bytes(uri)
    except FileNotFoundError:
        pass
    raise NotFoundError(f"there is no {uri.rsplit('/', 1)[-1]} yet")
