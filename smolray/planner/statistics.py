"""What a data set asks of a card: tiles, tokens and label tokens of a micro-batch, on average and at most.

In: the index beside the shards, or assumptions where the data are not prepared yet. Out: DataStatistics, which lays a
sample of the rows into micro-batches as an epoch's plan does (data/plan.py) and returns their Load.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from smolray.config import RunConfig
from smolray.planner.shapes import ModelShape

SAMPLED_ROWS = 1000
WINDOW = 8  # groups among which a micro-batch is filled, as in data/plan.py
# A data set that is not prepared yet is taken for one like VQAv2: photographs of 640 x 480, 5.4 questions each, short
# answers.
ASSUMED_WIDTH, ASSUMED_HEIGHT, ASSUMED_QUESTIONS, ASSUMED_QUESTION_TOKENS, ASSUMED_LABEL_TOKENS = 640, 480, 5, 20, 4
TOKENS_AROUND_TILE = 3  # fake_token_around_image, row and column, a share of the line breaks
TEMPLATE_TOKENS = 8


class NoDataError(ValueError):
    """Nothing is left to train on; the message says how to look."""


@dataclass(frozen=True)
class Row:
    """One shard row: its images' tiles, the prefix its conversations share, their whole lengths and label tokens."""

    tiles: int
    prefix: int
    lengths: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Load:
    """One micro-batch.

    `pairs`: query-key pairs that attention computes; `mask`: values of its mask, 0 where there is none.
    """

    samples: float
    sequences: float
    tokens: float  # positions, padding included
    pairs: float
    mask: float
    tiles: float  # computed, each distinct one once
    label_tokens: float
    tiles_spread: float = 0.0  # of a mean: standard deviation from one micro-batch to the next, as a share of it
    tokens_spread: float = 0.0


@dataclass(frozen=True)
class DataStatistics:
    """A sample of rows in the order of the shards, and the largest row of all."""

    rows: tuple[Row, ...]
    longest: int  # tokens of the longest packed sequence
    most_tiles: int  # of a row
    samples: int | None = None  # conversations in the data set
    assumed: bool = False  # not counted: no index at hand

    @property
    def tiles_per_row(self) -> float:
        return sum(row.tiles for row in self.rows) / len(self.rows)

    @property
    def questions_per_row(self) -> float:
        return sum(len(row.lengths) for row in self.rows) / len(self.rows)

    @property
    def tokens_per_sample(self) -> float:
        return sum(sum(row.lengths) for row in self.rows) / sum(len(row.lengths) for row in self.rows)

    @property
    def label_tokens_per_sample(self) -> float:
        return sum(sum(row.labels) for row in self.rows) / sum(len(row.labels) for row in self.rows)

    @classmethod
    def from_index(cls, index: pa.Table) -> "DataStatistics":
        """From the table of data/index.py (INDEX_SCHEMA). Raises NoDataError where no conversation is left to train on."""
        names = ("shard", "row_group", "row", "tokens", "prefix", "label_tokens", "tiles")
        column = {name: index[name].to_numpy() for name in names}
        kept = (column["tokens"] > 0) & (column["label_tokens"] > 0)
        if not kept.any():
            raise NoDataError(
                f"none of the {len(index)} conversations in the index has tokens to train on; see `smolray preview`"
            )
        column = {name: values[kept] for name, values in column.items()}
        changed = np.ones(len(column["row"]), bool)
        changed[1:] = np.any([column[n][1:] != column[n][:-1] for n in ("shard", "row_group", "row")], axis=0)
        starts = np.append(np.flatnonzero(changed), len(changed))
        packed = np.add.reduceat(column["tokens"], starts[:-1]) - column["prefix"][starts[:-1]] * (np.diff(starts) - 1)
        chosen = np.unique(np.linspace(0, len(starts) - 2, min(SAMPLED_ROWS, len(starts) - 1)).astype(int))
        rows = []
        for a, b in zip(starts[chosen], starts[chosen + 1], strict=True):
            lengths, labels = column["tokens"][a:b].tolist(), column["label_tokens"][a:b].tolist()
            rows.append(Row(int(column["tiles"][a]), int(column["prefix"][a]), tuple(lengths), tuple(labels)))
        return cls(tuple(rows), int(packed.max()), int(column["tiles"].max()), len(changed))

    @classmethod
    def default(cls, config: RunConfig, shape: ModelShape) -> "DataStatistics":
        """For a data set not prepared yet, tiled as the run's ImageConfig says."""
        tiles = assumed_tiles(config, shape)
        prefix = TEMPLATE_TOKENS + tiles * (shape.tokens_per_tile + TOKENS_AROUND_TILE)
        lengths = (prefix + ASSUMED_QUESTION_TOKENS + ASSUMED_LABEL_TOKENS,) * ASSUMED_QUESTIONS
        row = Row(tiles, prefix, lengths, (ASSUMED_LABEL_TOKENS,) * ASSUMED_QUESTIONS)
        return cls((row,), packed_tokens(row), tiles, assumed=True)

    def with_max_tiles(self, limit: int, tokens_per_tile: int) -> "DataStatistics":
        """As if image.max_tiles were `limit`: fewer tiles, and their tokens gone from every conversation."""

        def fewer(row: Row) -> Row:
            gone = max(row.tiles - limit, 0) * (tokens_per_tile + TOKENS_AROUND_TILE)
            return Row(
                min(row.tiles, limit),
                max(row.prefix - gone, 0),
                tuple(max(n - gone, 2) for n in row.lengths),
                row.labels,
            )

        gone = max(self.most_tiles - limit, 0) * (tokens_per_tile + TOKENS_AROUND_TILE)
        rows = tuple(map(fewer, self.rows))
        return replace(
            self,
            rows=rows,
            longest=max(self.longest - gone, *map(packed_tokens, rows), 2),
            most_tiles=min(self.most_tiles, limit),
        )

    def loads(self, config: RunConfig, micro_batch: int) -> tuple[Load, Load]:
        """The mean and the largest micro-batch of at most `micro_batch` conversations, packed as the run says.

        The largest takes each number at its own worst: every sequence as long as the longest, as many tiles as five
        deviations above the mean.
        """
        data, limit = config.data, config.train.micro_batch_tokens
        together = 1 if data.packing == "none" else min(data.max_questions_per_image, micro_batch)
        padded = data.packing != "full"
        groups = [
            group for number, row in enumerate(self.rows) for group in _groups(number, row, together, data.max_length)
        ]
        while len({number for number, *_ in groups}) < 8 and sum(n for _, _, n, _, _ in groups) < 2 * micro_batch:
            # a small sample, laid again and again
            groups += [(number + groups[-1][0] + 1, a, b, c, d) for number, a, b, c, d in groups]
        batches = [_load(batch, padded, data.packing != "none") for batch in _fill(groups, micro_batch, limit, padded)]
        batches = batches[:-1] if len(batches) > 1 else batches
        mean = Load(*(sum(values) / len(batches) for values in zip(*map(_numbers, batches), strict=True)))
        spreads = [float(np.std([getattr(b, name) for b in batches])) for name in ("tiles", "tokens")]
        mean = replace(
            mean, tiles_spread=spreads[0] / max(mean.tiles, 1.0), tokens_spread=spreads[1] / max(mean.tokens, 1.0)
        )
        longest = (
            min(self.longest, data.max_length)
            if together > 1
            else min(max(n for row in self.rows for n in row.lengths), data.max_length)
        )
        worst = Load(*map(max, zip(*map(_numbers, batches), strict=True)))
        tokens = max(worst.sequences * longest if padded else worst.tokens + longest, worst.tokens)
        tokens = max(min(tokens, limit), worst.tokens) if limit else tokens
        tiles = min(
            max(worst.tiles, mean.tiles + 5 * spreads[0], float(self.most_tiles)), worst.sequences * self.most_tiles
        )
        pairs = (
            max(worst.pairs, worst.sequences * longest**2 * (1 if worst.mask else 0.5))
            if padded
            else worst.pairs + longest**2 / 2
        )
        mask = worst.sequences * longest**2 if worst.mask else 0.0
        return mean, replace(worst, tokens=tokens, tiles=tiles, pairs=pairs, mask=mask)


def packed_tokens(row: Row) -> int:
    """The length of the packed sequence of a row: the shared prefix is counted once."""
    return sum(row.lengths) - row.prefix * (len(row.lengths) - 1)


def assumed_tiles(config: RunConfig, shape: ModelShape) -> int:
    """Tiles of a 640 x 480 photograph: crops of the vision tower's size after scaling (data/tiles.py), and the global
    view.
    """
    side, image = shape.vision.image_size, config.image
    edge = image.longest_edge or 4 * side
    edge = edge if image.upscale else min(edge, math.ceil(ASSUMED_WIDTH / side) * side)
    columns = math.ceil(edge / side)
    rows = math.ceil(columns * ASSUMED_HEIGHT / ASSUMED_WIDTH)
    tiles = rows * columns + 1 if columns > 1 else 1
    return min(tiles, image.max_tiles) if image.max_tiles else tiles


Group = tuple[int, int, int, int, int]  # row number, packed length, conversations, label tokens, tiles


def _groups(number: int, row: Row, together: int, max_length: int) -> list[Group]:
    """The conversations of a row in groups that share their prefix, as `lay_epoch` makes them."""
    groups: list[Group] = []
    for length, labels in zip(row.lengths, row.labels, strict=True):
        if groups:
            _, before, n, told, tiles = groups[-1]
            if n < together and before + length - row.prefix <= max_length:
                groups[-1] = (number, before + length - row.prefix, n + 1, told + labels, tiles)
                continue
        groups.append((number, length, 1, labels, row.tiles))
    return groups


def _fill(groups: Sequence[Group], samples: int, tokens: int | None, padded: bool) -> list[list[Group]]:
    """Micro-batches as data/plan.py fills them: the first group that waits opens one, and of the next few those are
    added that fit.
    """
    batches: list[list[Group]] = []
    coming, waiting = iter(groups), list[Group]()
    while waiting or not batches:
        waiting += islice(coming, WINDOW - len(waiting))
        batch: list[Group] = []
        longest = total = count = at = 0
        while at < len(waiting) and count < samples:
            _, length, size, _, _ = waiting[at]
            laid = max(longest, length) * (len(batch) + 1) if padded else total + length
            if batch and (count + size > samples or (tokens is not None and laid > tokens)):
                at += 1
                continue
            batch.append(waiting.pop(at))
            longest, total, count = max(longest, length), total + length, count + size
            waiting += islice(coming, 1)
        batches.append(batch)
    return [batch for batch in batches if batch]


def _load(batch: Sequence[Group], padded: bool, packed: bool) -> Load:
    lengths = [g[1] for g in batch]
    tiles = sum({g[0]: g[4] for g in batch}.values())
    samples, labels = sum(g[2] for g in batch), sum(g[3] for g in batch)
    if not padded:
        return Load(samples, len(batch), sum(lengths), sum(n * n for n in lengths) / 2, 0.0, tiles, labels)
    area = float(len(batch) * max(lengths) ** 2)
    masked = packed and any(g[2] > 1 for g in batch)
    return Load(
        samples,
        len(batch),
        len(batch) * max(lengths),
        area if masked else area / 2,
        area if masked else 0.0,
        tiles,
        labels,
    )


def _numbers(load: Load) -> tuple[Any, ...]:
    return load.samples, load.sequences, load.tokens, load.pairs, load.mask, load.tiles, load.label_tokens
