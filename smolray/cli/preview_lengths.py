"""Lengths of the training data in tokens, and the micro-batches that the plan of an epoch makes of them.

In: PreviewData. Out: a LengthSummary, and a table of it.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from rich.table import Table

from smolray import storage
from smolray.cli.preview import PreviewData
from smolray.config import RunConfig
from smolray.data.index import add_lengths, index_shard, index_uri, read_index
from smolray.data.max_length import chosen_length
from smolray.data.plan import PlanLimits, build_epoch
from smolray.run.account import DataAccount

BINS, BAR = 12, 40


@dataclass(frozen=True)
class LengthSummary:
    """Token counts of the data, and what became of it. `sample` says which part of it was counted; empty: all of it."""

    tokens: np.ndarray  # of each conversation that is trained
    label_tokens: int
    tiles: int
    rows: int
    account: DataAccount
    micro_batches: int
    padding: float  # fraction of the tokens of micro-batches that is padding
    sample: str = ""


def lengths(data: PreviewData, config: RunConfig) -> LengthSummary:
    """Lengths of the training data by its index.

    Without an index, those of the first shard, which is a fair sample because rows are shuffled. For raw data, those of
    the rows that were read.

    Raises PlanError where no conversation is left to train on.
    """
    first, uri = data.manifest.files[0].name, index_uri(data.folder, data.encoder)
    sample = "" if len(data.manifest.files) == 1 else "the first shard: there is no index yet"
    if storage.exists(uri):
        index, sample = read_index(uri), ""
    else:
        index = index_shard(data.folder, first, 0, data.encoder)
        if data.raw is not None:
            sample = "" if data.raw.whole else f"the first {data.raw.read:,} rows"

    longest = chosen_length([index], config, data.encoder.max_length)
    account = add_lengths(data.account, index, longest)
    return summarize(index, config.replace({"data.max_length": longest}), account, sample)


def summarize(index: pa.Table, config: RunConfig, account: DataAccount, sample: str = "") -> LengthSummary:
    """The lengths in an index, and the micro-batches and padding of the epoch that is planned from it."""
    plan = build_epoch(index, PlanLimits.of(config), config.seed, 0)
    column = {name: index[name].to_numpy() for name in index.column_names}
    kept = (column["tokens"] > 0) & (column["label_tokens"] > 0)

    place = np.stack([column[name] for name in ("shard", "row_group", "row")])
    first = np.ones(len(index), bool)
    first[1:] = (place[:, 1:] != place[:, :-1]).any(0)

    used = int(column["tokens"][plan.index_rows].sum())
    # the conversations of a group share their prefix
    used -= int((column["prefix"][plan.index_rows[plan.group_start[:-1]]] * (np.diff(plan.group_start) - 1)).sum())
    return LengthSummary(
        tokens=column["tokens"][kept],
        label_tokens=int(column["label_tokens"][kept].sum()),
        tiles=int(column["tiles"][first].sum()),
        rows=int(first.sum()),
        account=account,
        micro_batches=len(plan),
        padding=1 - used / int(plan.tokens.sum()),
        sample=sample,
    )


def lengths_table(summary: LengthSummary) -> Table:
    """A histogram of the lengths, with the totals below it."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("tokens", justify="right")
    table.add_column("conversations", justify="right")
    table.add_column("")
    for low, high, number, bar in _bins(summary.tokens):
        table.add_row(f"{low} to {high}" if high > low else f"{low}", f"{number:,}", bar)

    tokens = summary.tokens
    percentiles = ", ".join(
        f"{name} {np.percentile(tokens, p):.0f}" for name, p in (("median", 50), ("95 %", 95), ("longest", 100))
    )
    about = (
        f"{summary.label_tokens / tokens.sum():.1%} of the tokens trained; "
        f"{summary.tiles / summary.rows:.1f} tiles a row; "
        f"{summary.micro_batches:,} micro-batches{'' if summary.sample else ' an epoch'}, "
        f"{summary.padding:.1%} of them padding"
    )
    table.add_row("", f"{len(tokens):,}", percentiles, style="dim")
    table.add_row("", "", about, style="dim")
    if summary.sample:
        table.add_row("", "", f"counted: {summary.sample}", style="dim")
    return table


def _bins(tokens: np.ndarray) -> list[tuple[int, int, int, str]]:
    """Shortest length, longest length, conversations and bar of each bin of the histogram."""
    wanted = np.linspace(tokens.min(), tokens.max() + 1, BINS + 1).round().astype(int)
    counts, edges = np.histogram(tokens, bins=np.unique(wanted))
    most = counts.max()
    return [
        (int(low), int(high) - 1, int(number), "█" * -(-BAR * int(number) // int(most)))
        for low, high, number in zip(edges, edges[1:], counts, strict=False)
    ]
