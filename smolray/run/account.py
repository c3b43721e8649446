"""The account of a run's data: what became of each raw row and each conversation, as a record and as lines for people.

In: counts of `smolray prepare` (the rows of a source) and of the index (the lengths of its conversations). Out: a
DataAccount, which the manifest, the log, result.json, the report and `smolray status` tell in the same words.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

SHOWN_COLUMNS = 12


@dataclass(frozen=True)
class RowAccount:
    """The raw rows of a source: each has images, is text-only or is quarantined.

    Attributes:
        used: column -> what it was used as, such as "image" or "answer".
        unused: column -> rows in which it held a value and was not used.
        without_image: text-only rows among those that have a column for images.
        overlooked: what a column that matters and was not used looks like, with the remedy -> its rows.
    """

    with_images: int = 0
    text_only: int = 0
    without_image: int = 0
    quarantined: dict[str, int] = field(default_factory=dict)
    used: dict[str, str] = field(default_factory=dict)
    unused: dict[str, int] = field(default_factory=dict)
    overlooked: dict[str, int] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """All rows that were read."""
        return self.with_images + self.text_only + sum(self.quarantined.values())

    @classmethod
    def total(cls, parts: Iterable["RowAccount"]) -> "RowAccount":
        """The account of several parts of one source."""
        counts: Counter[str] = Counter()
        quarantined: Counter[str] = Counter()
        unused: Counter[str] = Counter()
        overlooked: Counter[str] = Counter()
        used: dict[str, str] = {}
        for part in parts:
            counts.update(with_images=part.with_images, text_only=part.text_only, without_image=part.without_image)
            quarantined.update(part.quarantined)
            unused.update(part.unused)
            overlooked.update(part.overlooked)
            used |= part.used
        return cls(
            **counts,
            quarantined=dict(sorted(quarantined.items())),
            used=dict(sorted(used.items())),
            unused={column: rows for column, rows in sorted(unused.items()) if column not in used},
            overlooked=dict(sorted(overlooked.items())),
        )


@dataclass(frozen=True)
class SourceAccount:
    """One of several sources: its conversations, and how many are trained in an epoch (0: not known yet)."""

    path: str
    conversations: int
    epoch: int = 0


@dataclass(frozen=True)
class DataAccount:
    """The data of one part of a run, from raw rows to what is trained or evaluated.

    Attributes:
        rows: None where the shards were made by a version that kept no account of them.
        conversations: in the shards.
        duplicates: conversations that say the same about the same images as another one.
        too_long: conversations left out, longer than `max_length` tokens.
        untrained: conversations left out, without a token to train on.
        cut: conversations whose text was cut at `max_length`.
        gone: how many files fewer the source had than when it was prepared before.
        held_out: conversations of these sources that are the validation data.
        leaked: of validation data, the images that the training data have as well; None: not known.
        pictures: distinct ones, where `leaked` is known.
        sources: each of them, where there are several.
        longest: lengths of the longest conversations that were left out or cut.
    """

    source: str
    conversations: int
    rows: RowAccount | None = None
    duplicates: int = 0
    too_long: int = 0
    untrained: int = 0
    cut: int = 0
    longest: tuple[int, ...] = ()
    max_length: int = 0
    gone: int = 0
    held_out: int = 0
    leaked: int | None = None
    pictures: int = 0
    sources: tuple[SourceAccount, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """The sources by their paths."""
        return tuple(one.path for one in self.sources) or ((self.source,) if self.source else ())

    @property
    def left_out(self) -> int:
        """Conversations of the shards that are not used."""
        return self.too_long + self.untrained

    def to_json(self) -> dict[str, Any]:
        """A record for a log, with the conversations that are used."""
        lists = {"longest": [*self.longest], "sources": [asdict(one) for one in self.sources]}
        return asdict(self) | lists | {"kept": self.conversations - self.left_out}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "DataAccount":
        """The account in a record; what an earlier or later version wrote besides it is ignored."""
        known = {f.name: record[f.name] for f in fields(cls) if f.name in record}
        rows = RowAccount(**known["rows"]) if known.get("rows") else None
        sources = tuple(SourceAccount(**one) for one in known.get("sources", ()))
        return cls(**known | {"rows": rows, "longest": tuple(known.get("longest", ())), "sources": sources})

    def lines(self, part: str) -> list[str]:
        """The account in words, one line for each thing to know."""
        return [*self._row_lines(part), self._kept_line(part), *self._length_lines(part), *self._side_lines(part)]

    def _row_lines(self, part: str) -> list[str]:
        if self.rows is None:
            return []
        rows = self.rows
        kinds = [f"{rows.with_images:,} with images", f"{rows.text_only:,} text-only"]
        if rows.without_image:
            kinds[-1] += f" ({rows.without_image:,} whose image is empty)"
        bad = ", ".join(f"{reason} {count:,}" for reason, count in rows.quarantined.items())
        kinds.append(f"{sum(rows.quarantined.values()):,} quarantined{f' ({bad})' if bad else ''}")
        said = [f"{part}: {rows.rows:,} rows read: {', '.join(kinds)}"]
        if self.gone:
            said.append(f"{part}: {self.source} has {self.gone:,} files fewer than when it was prepared before")

        if rows.used:
            used = ", ".join(column if column == use else f"{column} as {use}" for column, use in rows.used.items())
            unused = ", ".join(list(rows.unused)[:SHOWN_COLUMNS])
            more = f" and {len(rows.unused) - SHOWN_COLUMNS} more" if len(rows.unused) > SHOWN_COLUMNS else ""
            said.append(f"{part}: columns used: {used}; not used: {unused or 'none'}{more}")
        return said + [f"{part}: {column}: {count:,} rows" for column, count in rows.overlooked.items()]

    def _kept_line(self, part: str) -> str:
        kept = f"{self.conversations - self.left_out:,} of {self.conversations:,} conversations kept"
        return f"{part}: {kept}, {self.left_out:,} left out, {self.cut:,} cut, {self.duplicates:,} duplicates"

    def _length_lines(self, part: str) -> list[str]:
        said = []
        longest = f" (the longest: {', '.join(f'{n:,}' for n in self.longest)} tokens)" if self.longest else ""
        over = f"longer than data.max_length = {self.max_length:,}"
        if self.too_long:
            remedy = "raise data.max_length, lower image.max_tiles, or set data.overlong=truncate_text"
            said.append(f"{part}: left out {self.too_long:,} conversations {over}{longest}: {remedy}")
        if self.cut:
            said.append(f"{part}: cut the text of {self.cut:,} conversations {over}{'' if self.too_long else longest}")
        if self.untrained:
            said.append(f"{part}: left out {self.untrained:,} conversations without a token to train on")
        return said

    def _side_lines(self, part: str) -> list[str]:
        """Several sources, and what is on both sides of training and validation."""
        said = []
        total = sum(one.epoch for one in self.sources)
        for one in self.sources:
            share = f", {one.epoch:,} an epoch ({one.epoch / total:.1%})" if total else ""
            said.append(f"{part}: {one.path}: {one.conversations:,} conversations{share}")
        if self.held_out:
            said.append(
                f"{part}: {self.held_out:,} conversations more are held out for validation; no image is on both sides"
            )
        if self.leaked is not None:
            told = "; their scores say less than they seem to" if self.leaked else ""
            said.append(f"{part}: {self.leaked:,} of {self.pictures:,} images are also in the training data{told}")
        return said


def account_lines(accounts: Mapping[str, Any]) -> list[str]:
    """The lines of all parts. `accounts`: part -> record, as an event or result.json holds them."""
    return [
        line
        for part in ("train", "validation")
        if isinstance(accounts.get(part), Mapping)
        for line in DataAccount.from_json(accounts[part]).lines(part)
    ]
