"""Counts the raw rows of a source while they are parsed: with images, text-only, quarantined; and their columns.

In: each record with what became of it. Out: a RowAccount (run/account.py).
"""

import re
from collections import Counter
from typing import Any

from smolray.config import DataConfig
from smolray.data.formats.columns import RawRecord
from smolray.data.formats.image_columns import IMAGE_COLUMNS
from smolray.data.formats.unused import ParsedRow, unused_columns
from smolray.data.formats.values import is_empty
from smolray.run.account import RowAccount

# The index of a table that pandas has written into a CSV file and read again, once or more often.
_INDEX_COLUMN = re.compile(r"Unnamed: 0(?:\.\d+)*")


def _says_something(column: str, value: Any) -> bool:
    """Whether a value is worth telling: it is not empty, and not the number of its row."""
    return not is_empty(value) and not (_INDEX_COLUMN.fullmatch(str(column)) and str(value).isdigit())


class RowTally:
    """Counts rows one after another. Every row is added once, by `keep` or `quarantine`."""

    def __init__(self, data: DataConfig):
        named = [data.columns.image] if isinstance(data.columns.image, str) else data.columns.image
        self.data = data
        self.image_columns = {name.lower() for name in (*IMAGE_COLUMNS, *named) if name}
        self.with_images = self.text_only = self.without_image = 0
        self.quarantined: Counter[str] = Counter()
        self.unused: Counter[str] = Counter()
        self.overlooked: Counter[str] = Counter()
        self.used: dict[str, str] = {}

    def keep(self, record: RawRecord, parsed: ParsedRow) -> None:
        """Add a row that became samples."""
        images = any(sample.images for sample in parsed.samples)
        self.with_images += images
        self.text_only += not images
        self.without_image += not images and any(str(column).lower() in self.image_columns for column in record)
        self.used |= parsed.used
        if unused := [str(c) for c, value in record.items() if c not in parsed.used and _says_something(c, value)]:
            self.unused.update(unused)
            self.overlooked.update(map(str, unused_columns(record, parsed, self.data)))

    def quarantine(self, reason: str) -> None:
        """Add a row that cannot be used."""
        self.quarantined[reason] += 1

    def account(self) -> RowAccount:
        """What was counted so far."""
        return RowAccount.total(
            [
                RowAccount(
                    self.with_images,
                    self.text_only,
                    self.without_image,
                    dict(self.quarantined),
                    self.used,
                    dict(self.unused),
                    dict(self.overlooked),
                )
            ]
        )
