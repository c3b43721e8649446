"""The command `smolray`: assembles the commands of the other modules of this package.

Commands are thin: they read arguments, call the package and print. Modules that need Ray or torch are imported inside a
command, so that `smolray --help` starts at once.

Errors of our own modules are printed as one message with exit code 2; `--debug` shows their traceback.
"""

import inspect
import io
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from smolray import __version__
from smolray.cli import (
    cluster,
    config,
    data,
    environment,
    generate,
    kubernetes,
    results,
    runs,
    search,
    serve,
    submit,
    train,
    web,
)
from smolray.cli.options import errors, plain
from smolray.cli.settings import SettingsCommand
from smolray.cluster.signals import Stopped, stop_signals

# Heading in `smolray --help` -> the commands below it, in order.
COMMANDS = {
    "Data": (data.prepare, data.preview),
    "Training": (train.train, train.resume, train.plan, train.tune),
    "Runs": (runs.status, runs.logs, runs.stop, runs.queue, web.web),
    "Results": (
        results.evaluate,
        results.compare,
        results.report,
        results.checkpoints,
        results.track,
        results.export,
    ),
    "Use a model": (generate.generate, serve.serve),
    "Clusters": (submit.submit, cluster.doctor),
    "Setup": (environment.env,),
}
# Heading -> groups of commands below it, by name.
GROUPS = {
    "Setup": {"config": config.config_app},
    "Use a model": {"search": search.search_app, "key": serve.key_app},
    "Clusters": {"cluster": cluster.cluster_app, "k8s": kubernetes.k8s_app},
}


GO_ON = ("prepare", "train", "resume", "tune", "evaluate", "export", "generate", "search", "report")


class _CleanErrors(TyperGroup):
    """Prints errors that are written for the user without a traceback. A fault in the program keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # what an ASCII terminal cannot show
        try:
            with stop_signals():
                return super().invoke(ctx)
        except Stopped as stopped:
            again = "stopped; give the same command again to go on" if ctx.invoked_subcommand in GO_ON else ""
            if message := str(stopped) or again:
                errors.print(plain(message), soft_wrap=True)
            raise typer.Exit(stopped.code) from None
        except Exception as error:
            cause = getattr(error, "cause", None) or error  # Ray wraps what a task raised
            if ctx.params.get("debug") or not _is_our_message(cause):
                raise
            errors.print(f"[red]error:[/red] {plain(str(cause) or type(cause).__name__)}", soft_wrap=True)
            raise typer.Exit(2) from None


def _is_our_message(error: BaseException) -> bool:
    """Whether the message of an error is written for the user: errors of the system and of this package."""
    return isinstance(error, OSError) or any(c.__module__.split(".")[0] == "smolray" for c in type(error).__mro__)


app = typer.Typer(cls=_CleanErrors, no_args_is_help=True, pretty_exceptions_enable=False)
for heading, commands in COMMANDS.items():
    for command in commands:
        kind = SettingsCommand if "overrides" in inspect.signature(command).parameters else None
        app.command(cls=kind, rich_help_panel=heading)(command)
for heading, groups in GROUPS.items():
    for name, group in groups.items():
        app.add_typer(group, name=name, rich_help_panel=heading)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"smolray {__version__}")
        raise typer.Exit


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Fine-tune small vision-language models over whatever GPUs you own."""
