"""Shared by the commands: consoles, common arguments, and the settings of an existing run."""

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from smolray.config import ConfigError, RunConfig, load_config
from smolray.run.folder import RunFolder
from smolray.run.status import require_run
from smolray.storage import absolute

console, errors = Console(highlight=False), Console(stderr=True, highlight=False)

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE…", help="settings, such as optimizer.learning_rate=1e-4")
]
ConfigFile = Annotated[
    str | None, typer.Option("--config", "-c", help="YAML file of the run, or a recipe of `smolray config list`")
]
Name = Annotated[str, typer.Argument(help="name of the run")]
Storage = Annotated[str, typer.Option(envvar="SMOLRAY_STORAGE", help="folder or URI that holds the runs")]
Address = Annotated[str | None, typer.Option(help="job server of a cluster, such as http://head:8265")]
Checkpoint = Annotated[str | None, typer.Option(help="default: the best, else the newest")]


def plain(text: str) -> str:
    """The text escaped for rich, so that nothing in it is read as markup."""
    return escape(text)


def job_client(address: str) -> Any:
    """A client of the job server at `address`. Raises JobsError where none answers."""
    from smolray.cluster.jobs import open_client

    return open_client(address)


def stored_config(name: str, storage: str, overrides: list[str] | None = None) -> tuple[RunConfig, list[str]]:
    """The stored settings of a run, changed by `overrides`, and the arguments of `smolray train` for them.

    Raises RunNotFoundError, and ConfigError where an override would rename or move the run.
    """
    overrides = overrides or []
    if moved := [o for o in overrides if o.partition("=")[0] in ("name", "storage")]:
        raise ConfigError(f"{moved[0]}: a run keeps its name and storage; copy its config for a new run")

    path = RunFolder(absolute(require_run(storage, name))).config
    # The folder may have been moved, or be reached by another path, since the config was written into it.
    arguments = [*overrides, f"name={name}", f"storage={absolute(storage)}"]
    return load_config(path, arguments), ["--config", path, *arguments]
