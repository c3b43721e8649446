"""What all commands share: where they print, how they name their arguments, how they reach a job server."""

from typing import Annotated, Any

import typer
from rich.console import Console

console, errors = Console(highlight=False), Console(stderr=True, highlight=False)

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE…", help="settings, such as optimizer.learning_rate=1e-4")
]
ConfigFile = Annotated[str | None, typer.Option("--config", "-c", help="YAML file of the run")]
Name = Annotated[str, typer.Argument(help="name of the run")]
Storage = Annotated[str, typer.Option(envvar="SMOLRAY_STORAGE", help="folder or URI under which runs live")]
Address = Annotated[str | None, typer.Option(help="job server of a cluster, such as http://head:8265")]


def plain(text: str) -> str:
    """The text as it is: nothing in it is markup."""
    from rich.markup import escape

    return escape(text)


def jobs(address: str) -> Any:
    """A client of the job server at `address`."""
    from smolray.cluster.jobs import connect

    return connect(address)
