"""The commands `smolray config …`: recipes to start from, the settings of a run in full, and their schema."""

import json
from typing import Annotated

import typer

from smolray.cli.options import ConfigFile, Overrides
from smolray.config import RunConfig, load_config, to_yaml
from smolray.config.recipes import recipe_text, recipes

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


@config_app.command("show")
def show(overrides: Overrides = None, config: ConfigFile = None) -> None:
    """Print all settings of a run as YAML, defaults included."""
    typer.echo(to_yaml(load_config(config, overrides or ())), nl=False)


@config_app.command("schema")
def schema() -> None:
    """Print the JSON schema of a run's settings, for editors."""
    typer.echo(json.dumps(RunConfig.model_json_schema(), indent=1))
