"""All data formats. To add one, write a module in this folder and add it to FORMATS."""

import difflib

from smolray.config import ConfigError, DataConfig
from smolray.data.formats.arrow import ARROW
from smolray.data.formats.coco import COCO
from smolray.data.formats.csv import CSV
from smolray.data.formats.hub import HUB
from smolray.data.formats.imagefolder import IMAGEFOLDER
from smolray.data.formats.jsonl import JSONL
from smolray.data.formats.parquet import PARQUET
from smolray.data.formats.source import Format
from smolray.data.formats.webdataset import WEBDATASET

# Where a source holds metadata files of several formats, the first of these formats is taken.
FORMATS: dict[str, Format] = {f.name: f for f in (PARQUET, ARROW, WEBDATASET, JSONL, CSV, COCO, IMAGEFOLDER, HUB)}


def named_format(data: DataConfig) -> Format | None:
    """The format that data.format names; None for auto. Raises ConfigError where there is no such format."""
    if data.format == "auto":
        return None
    if data.format not in FORMATS:
        near = difflib.get_close_matches(data.format, FORMATS, n=1, cutoff=0.3)
        raise ConfigError(
            f"data.format = {data.format!r}: expected auto, {', '.join(FORMATS)}"
            + (f"; nearest: {near[0]}" if near else "")
        )
    return FORMATS[data.format]
