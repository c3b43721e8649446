"""A public data set's layout: three rows with its columns, made by hand, and what becomes of the first one."""

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

HERE = "▢"  # stands for an image in the text of a turn
COLOURS = ("red", "green", "blue", "black", "white", "gold", "pink")


def encoded(number: int) -> bytes:
    """A PNG, another one for each number."""
    sink = io.BytesIO()
    Image.new("RGB", (6 + number // 7, 4), COLOURS[number % 7]).save(sink, "PNG")
    return sink.getvalue()


def pic(number: int) -> dict[str, Any]:
    """An image as the Hugging Face hub keeps it in Parquet."""
    return {"bytes": encoded(number), "path": f"{number}.png"}


@dataclass(frozen=True)
class Layout:
    """One data set.

    `row`: makes row 0, 1 or 2. `asked`: the first row's turns before the answer, HERE for an image. `said`: the answer,
    or "chosen | rejected". `refused`: a pattern of the message where it cannot be used. `lines`: JSON lines beside
    image files `0.png` …, not Parquet.
    """

    name: str
    row: Callable[[int], dict[str, Any]]
    asked: str = ""
    said: str = ""
    refused: str = ""
    why: str = ""  # for the table, where the pattern does not say it
    settings: dict[str, Any] = field(default_factory=dict)
    images: tuple[int, ...] = (1, 1, 1)
    lines: bool = False
