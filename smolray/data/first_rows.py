"""The first rows of raw data, parsed as `prepare` parses them, in this process and without Ray.

In: a source (path, URI, glob, hub id) and a number of rows. Out: FirstRows: shard rows in the order of the source, and
each row that `prepare` would quarantine, with the reason.
"""

from dataclasses import dataclass
from itertools import islice, zip_longest

from smolray.config import DataConfig
from smolray.data.formats.discover import iter_read_tasks, read_rows, resolve
from smolray.data.formats.images import ImageReader, image_reader
from smolray.data.formats.layouts import parse
from smolray.data.formats.source import SourceError
from smolray.data.formats.unused import unused_columns, unused_message
from smolray.data.sample import Sample, SampleError, ShardRow, image_key
from smolray.data.tally import RowTally
from smolray.run.account import DataAccount, RowAccount, SourceAccount

EXAMPLES = 3
CHECKED_ROWS = 16  # in which no column that matters may stand unused


@dataclass(frozen=True)
class LeftOut:
    """A raw row that cannot become a sample: its place in the source, the class of the fault, and what is wrong."""

    id: str
    reason: str
    message: str


@dataclass(frozen=True)
class FirstRows:
    """The first rows of a source. `account`: of the raw rows; `whole`: whether those were all of the source."""

    rows: list[ShardRow]
    account: DataAccount
    left_out: list[LeftOut]
    whole: bool

    @property
    def read(self) -> int:
        """How many raw rows were looked at."""
        return self.account.rows.rows if self.account.rows else 0


def first_rows(source: str, data: DataConfig, limit: int) -> FirstRows:
    """Read at most `limit` raw rows of `source`; conversations about the same images are gathered into one row.

    Raises SourceError where the source cannot be read, is empty, none of these rows can be used, or a
    column that matters stands unused.
    """
    tasks = iter_read_tasks(resolve(source, data))
    raw_rows = ((task, raw) for task in tasks for raw in read_rows(task))
    readers: dict[str, ImageReader] = {}
    samples: list[Sample] = []
    left_out: list[LeftOut] = []
    tally = RowTally(data)

    for read, (task, raw) in enumerate(islice(raw_rows, limit)):
        row_id = f"{task.name}#{raw.name or raw.row}"
        if task.uri not in readers:
            readers[task.uri] = image_reader(task, data)
        try:
            if raw.reason:
                raise SampleError(raw.reason, raw.message)
            parsed = parse(raw.record, row_id, data, readers[task.uri])
        except SampleError as error:
            left_out.append(LeftOut(row_id, error.reason, str(error)))
            tally.quarantine(error.reason)
            continue

        tally.keep(raw.record, parsed)
        samples += parsed.samples
        if read < CHECKED_ROWS and (unused := unused_columns(raw.record, parsed, data)):
            raise SourceError(unused_message(task.uri, unused))

    rows = tally.account()
    if not rows.rows:
        raise SourceError(f"{source} holds no rows")
    if not samples:
        examples = "\n".join(f"  {bad.id}: {bad.reason}: {bad.message}" for bad in left_out[:EXAMPLES])
        raise SourceError(f"none of the first {rows.rows} rows of {source} can be used:\n{examples}")
    distinct = {(sample.images, sample.conversation.content) for sample in samples}
    account = DataAccount(source, len(samples), rows, duplicates=len(samples) - len(distinct))
    return FirstRows(_gathered(samples), account, left_out, whole=next(raw_rows, None) is None)


def first_rows_of(data: DataConfig, limit: int) -> FirstRows:
    """The first rows of the training data, of each source as many. Raises what `first_rows` raises."""
    each = max(1, limit // len(data.sources))
    found = [first_rows(source.path, data.of_source(source), each) for source in data.sources]
    if len(found) == 1:
        return found[0]

    accounts = [one.account for one in found]
    sources = tuple(SourceAccount(one.source, one.conversations) for one in accounts)
    account = DataAccount(
        ", ".join(one.source for one in accounts),
        sum(one.conversations for one in accounts),
        RowAccount.total(one.rows for one in accounts if one.rows),
        sum(one.duplicates for one in accounts),
        sources=sources,
    )
    rows = [row for together in zip_longest(*(one.rows for one in found)) for row in together if row is not None]
    return FirstRows(rows, account, [bad for one in found for bad in one.left_out], all(one.whole for one in found))


def _gathered(samples: list[Sample]) -> list[ShardRow]:
    """One row for each set of images, in the order in which they first appear."""
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        found.setdefault(image_key(sample.images, sample.conversation), []).append(sample)
    return [ShardRow(key, same[0].images, tuple(s.conversation for s in same)) for key, same in found.items()]
