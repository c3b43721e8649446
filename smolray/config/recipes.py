"""The recipes that ship with smolray: settings of whole runs to start from, one YAML file each in smolray/recipes.

In: the name of a recipe. Out: its file. The first line of the file says what it is for.
"""

import difflib
from pathlib import Path

from smolray import storage
from smolray.config.errors import ConfigError

FOLDER = Path(__file__).parents[1] / "recipes"


def recipes() -> dict[str, str]:
    """The line that describes each recipe, by its name."""
    return {path.stem: _first_line(path).removeprefix("# ") for path in sorted(FOLDER.glob("*.yaml"))}


def recipe_text(name: str) -> str:
    """The YAML text of a recipe. Raises ConfigError, which names the recipes that exist."""
    if name not in recipes():
        raise ConfigError(f"no recipe is called {name!r}; {_choices(name)}")
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def config_file(given: str) -> str:
    """The path or URI of the YAML file that `given` names: a file, or where there is none, the recipe of that name.

    Raises ConfigError where it is neither.
    """
    if given in recipes() and not storage.exists(given):
        return str(FOLDER / f"{given}.yaml")
    if "." not in given and "/" not in given and not storage.exists(given):
        raise ConfigError(f"{given!r} is neither a config file nor a recipe; {_choices(given)}")
    return given


def _choices(name: str) -> str:
    near = difflib.get_close_matches(name, recipes(), n=1, cutoff=0.5)
    return f"recipes: {', '.join(recipes())}" + (f"; nearest: {near[0]}" if near else "")


def _first_line(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.readline().strip()
