"""The commands `smolray config …`: recipes to start from, the settings of a run in full, and their schema."""

import json
from typing import Annotated

import typer
import yaml

from smolray.cli.options import ConfigFile, Overrides
from smolray.cli.settings import SettingsCommand
from smolray.config import RunConfig, load_config, to_yaml
from smolray.config.importer import import_settings, nested
from smolray.config.recipes import recipe_text, recipes
from smolray.config.rules import faults

config_app = typer.Typer(no_args_is_help=True, help="Start from a recipe; show the settings of a run or their schema.")


@config_app.command("list")
def list_recipes() -> None:
    """List the recipes to start from."""
    width = max(map(len, recipes()))
    for name, description in recipes().items():
        typer.echo(f"{name:{width}}  {description}")


@config_app.command("new")
def new(recipe: Annotated[str, typer.Argument(help="a recipe of `smolray config list`")]) -> None:
    """Print a recipe, to save and change it.

    Example: smolray config new vqa_lora > run.yaml
    """
    typer.echo(recipe_text(recipe), nl=False)


@config_app.command("show", cls=SettingsCommand)
def show(overrides: Overrides = None, config: ConfigFile = None) -> None:
    """Print all settings of a run as YAML, defaults included."""
    typer.echo(to_yaml(load_config(config, overrides or ())), nl=False)


@config_app.command("import")
def import_(
    file: Annotated[str, typer.Argument(metavar="FILE", help="YAML of TRL, LLaMA-Factory or Axolotl")],
) -> None:
    """Print the settings of another trainer's YAML as ours, to save.

    What has no counterpart stands at the end, as comments. Example: smolray config import trl.yaml > run.yaml
    """
    found, missing = import_settings(file)
    typer.echo(yaml.safe_dump(nested(found), sort_keys=False, allow_unicode=True), nl=False)
    for name, why in missing.items():
        typer.echo(f"# {name}: {why}")
    for fault in faults(RunConfig.model_validate(nested(found))):
        typer.echo(f"# to mend: {fault}")


@config_app.command("schema")
def schema() -> None:
    """Print the JSON schema of a run's settings, for editors."""
    typer.echo(json.dumps(RunConfig.model_json_schema(), indent=1))
