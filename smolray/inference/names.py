"""What a name can be: a run, or else a folder or hub id of a model.

In: the name, and where the runs are. Out: the folder of the run, or None for a model. It loads nothing large, so that
a mistyped name is told at once.
"""

from pathlib import Path

from smolray import storage
from smolray.config import ConfigError
from smolray.run.folder import RunFolder
from smolray.run.status import require_run


def find_run(name: str, storage_uri: str) -> str | None:
    """The folder of a run by its name or its folder; None where transformers may know the name.

    Raises RunNotFoundError or ConfigError where the name can be neither.
    """
    for run_dir in (storage.join(storage_uri, name), name):
        if storage.exists(RunFolder(run_dir).config):
            return storage.absolute(run_dir)

    if "://" in name:
        return None
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "config.json").exists():
        hint = ""
        if (folder / "adapter_config.json").exists():
            hint = " It holds adapters alone: name the run, or export it without --adapter."
        raise ConfigError(f"{name} is neither a run (config.yaml) nor a model (config.json).{hint}")
    if not folder.is_dir() and name.count("/") != 1:
        require_run(storage_uri, name)
    return None
