"""Counts the raw rows of a source while they are parsed: with images, text-only, quarantined; and their columns.

In: each record with what became of it. Out: a RowAccount (run/account.py).
"""

from collections import Counter

from smolray.config import DataConfig
from smolray.data.formats.columns import RawRecord
from smolray.data.formats.pictures import IMAGE_COLUMNS
from smolray.data.formats.unused import ParsedRow, unused_columns
from smolray.data.formats.values import is_empty
from smolray.run.account import RowAccount


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
        if unused := [str(c) for c, value in record.items() if c not in parsed.used and not is_empty(value)]:
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
