"""Commands that take settings: a YAML file as an argument, and settings as `--key value` beside `key=value`.

In: the words of a command line. Out: the words as the command declares them, `--config FILE` and `key=value`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from typer.core import TyperCommand

from smolray.config.recipes import recipes


class SettingsCommand(TyperCommand):
    """A command with the arguments Overrides and ConfigFile (options.py), or only the first."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words of the command line."""
        options = {
            name: not (getattr(parameter, "is_flag", False) or getattr(parameter, "count", False))
            for parameter in self.get_params(ctx)
            for name in (*parameter.opts, *parameter.secondary_opts)
            if name.startswith("-")
        }
        return super().parse_args(ctx, settings_as_words(args, options))


def settings_as_words(args: Sequence[str], options: Mapping[str, bool]) -> list[str]:
    """The words with a YAML file as `--config FILE` and `--key value` as `key=value`.

    `options`: the options that the command itself has, and whether each takes a value.
    """
    words: list[str] = []
    left = list(args)
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        if word == "--":
            return [*words, word, *left]
        if name in options:
            words += [word, left.pop(0)] if options[name] and not equals and left else [word]
        elif word.startswith("--"):
            if not equals:
                value = left.pop(0) if left and not left[0].startswith("--") else "true"
            words.append(f"{name.removeprefix('--').replace('-', '_')}={value}")
        elif "--config" in options and ((word.endswith((".yaml", ".yml")) and not equals) or word in recipes()):
            words += ["--config", word]
        else:
            words.append(word)
    return words
