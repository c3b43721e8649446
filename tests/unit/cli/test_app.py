"""Errors are one message and exit code 2; every command is described in one line."""

import subprocess
import sys

import pytest
import typer

from smolray import __version__
from smolray.cli import app as cli
from smolray.cli import config as config_commands
from smolray.config import ConfigError
from tests.commands import refused, smolray


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["config", "show", "engine.stage=9"], "engine.stage = 9"),
        (["config", "show", "-c", "absent.yaml"], "absent.yaml"),
        (["train", "model.train=[]"], "nothing would be trained"),
        (["prepare", "out=/tmp/x"], "data.train = ''"),
        (["plan", "--inventory", "2x rtx4091", "model.path=random-256m"], "rtx4090"),
        (["plan", "--measure", "--inventory", "2x rtx4090", "model.path=random-256m"], "use one of the two"),
        (["tune", "name=x"], "search"),
        (["k8s", "render", "-c", "absent.yaml"], "absent.yaml"),
        (["status", "nope", "--storage", "{storage}"], "no run 'nope'"),
        (["logs", "nope", "--storage", "{storage}"], "there: demo"),
        (["export", "nope", "--storage", "{storage}"], "there: demo"),
        (["resume", "demo", "name=other", "--storage", "{storage}"], "keeps its name"),
        (["resume", "demo", "engine.stage=8", "--storage", "{storage}"], "engine.stage = 8"),
        (["status", "--storage", "s3://key:secret@host/runs"], "credentials"),
        (["status", "--storage", "ftp://host/runs"], "ftp://host/runs"),
        (["stop", "demo", "--storage", "{storage}", "--address", "head:8265"], "expected http://HEAD:8265"),
        (
            ["stop", "demo", "--storage", "{storage}", "--address", "http://127.0.0.1:9"],
            "no job server answers at http://127.0.0.1:9",
        ),
    ],
)
def test_an_error_is_one_message_and_code_2(run, arguments, told):
    assert told in refused(*[a.format(storage=run.parent) for a in arguments])
    assert not (run / "control").exists(), "a refused command changes nothing"


def test_markup_in_a_value_is_printed_as_it_is():
    assert "[red]x[/red][/nope]" in refused("config", "show", "model.dtype='[red]x[/red][/nope]'")


def test_debug_keeps_the_traceback_and_a_fault_of_ours_is_not_hidden(monkeypatch):
    assert isinstance(smolray("--debug", "config", "show", "seed=-1").exception, ConfigError)
    monkeypatch.setattr(config_commands, "to_yaml", lambda run: {}["a fault"])
    assert isinstance(smolray("config", "show").exception, KeyError)


def every_command():
    """(words, command) of each command, groups included."""
    for name, command in typer.main.get_command(cli.app).commands.items():
        nested = getattr(command, "commands", {})
        yield from ((f"{name} {word}", inner) for word, inner in nested.items())
        if not nested:
            yield name, command


@pytest.mark.parametrize(("name", "command"), [pytest.param(*c, id=c[0]) for c in every_command()])
def test_every_command_is_described_in_one_line(name, command):
    first, _, rest = command.help.partition("\n")
    assert first.endswith(".") and len(first) <= 80 and not rest.strip("\n").startswith(" "), name
    assert not rest or rest.startswith("\n"), "a blank line ends the first line"
    for option in command.params:
        assert option.name == "help" or option.help, f"{name}: {option.name} is not described"


def test_the_command_line_is_a_module_too():
    done = subprocess.run([sys.executable, "-m", "smolray", "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"smolray {__version__}\n", done.stderr


def test_a_mistyped_command_is_answered_with_the_nearest():
    done = smolray("tran")
    assert done.exit_code == 2 and "train" in done.stderr
