"""Previews in a line: of a config the items and lengths that `smolray preview` prints."""

from itertools import islice

from rich.console import Console

from smolray.cli.preview import open_preview
from smolray.cli.preview_lengths import lengths
from smolray.cli.preview_samples import preview_item
from smolray.config import RunConfig


def config_of(path, train, **sections):
    image = {"longest_edge": 128}
    return RunConfig(
        model={"path": path},
        image=image,
        **{"data": {"train": train, "max_length": 300} | sections.pop("data", {})} | sections,
    )


def items_of(config, count):
    """The first conversation of each of the first rows, as the command prints them."""
    with open_preview(config, count) as data:
        return [preview_item(row, row.conversations[0], data.encoder) for row in islice(data.rows(), count)]


def lengths_of(config):
    with open_preview(config, 0) as data:
        return lengths(data, config)


def printed(renderable, **options):
    console = Console(width=200, **options)
    with console.capture() as out:
        console.print(renderable, soft_wrap=True)
    return out.get()
