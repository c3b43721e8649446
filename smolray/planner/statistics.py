"""The size of micro-batches of a data set: tiles, tokens and label tokens, on average and at most.

In: the index of the shards, or assumptions where the data is not prepared yet. Out: DataStatistics. It packs a sample
of the rows into micro-batches, as an epoch's plan does (data/plan.py), and returns their Load.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from smolray.config import RunConfig
from smolray.data.fill import Groups, PlanLimits, fill_micro_batches, group_conversations, packed_length
from smolray.data.repeats import source_numbers
from smolray.planner.shapes import ModelShape

SAMPLED_ROWS = 1000
# A data set that is not prepared yet is assumed to be like VQAv2: photographs of 640 x 480, 5.4 questions each, short
# answers.
ASSUMED_WIDTH, ASSUMED_HEIGHT, ASSUMED_QUESTIONS, ASSUMED_QUESTION_TOKENS, ASSUMED_LABEL_TOKENS = 640, 480, 5, 20, 4
TEMPLATE_TOKENS = 8


class NoDataError(ValueError):
    """There is nothing to train on. The message says how to look at the data."""


@dataclass(frozen=True)
class Row:
    """One row of a shard.

    `tiles`: of its images. `prefix`: tokens that its conversations share. `lengths`, `labels`: tokens and label tokens
    of each conversation.
    """

    tiles: int
    prefix: int
    lengths: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Load:
    """The size of a micro-batch.

    `pairs`: query-key pairs that attention computes. `mask`: values of its mask; 0 without a mask.
    """

    samples: float
    sequences: float
    tokens: float  # positions, padding included
    pairs: float
    mask: float
    tiles: float  # that the vision tower computes: each distinct one once
    label_tokens: float
    # of a mean: the standard deviation between micro-batches, as a share of the mean
    tiles_spread: float = 0.0
    tokens_spread: float = 0.0


@dataclass(frozen=True)
class DataStatistics:
    """A sample of rows in the order of the shards, and the largest row of all."""

    rows: tuple[Row, ...]
    longest: int  # tokens of the longest packed sequence
    most_tiles: int  # of a row
    samples: int | None = None  # conversations in the data set
    assumed: bool = False  # not counted: there is no index

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
    def from_index(cls, index: pa.Table, repeats: Sequence[float] = ()) -> "DataStatistics":
        """From the index of the shards (data/index.py, INDEX_SCHEMA).

        `repeats`: how often each source is trained in an epoch (data/repeats.py); empty: once.

        Raises:
            NoDataError: no conversation has tokens to train on.
        """
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
        samples = len(changed)
        if repeats:
            times = np.array(repeats)[source_numbers(index)[kept]]
            shares = np.cumsum(np.add.reduceat(times, starts[:-1]) / np.diff(starts))
            chosen = np.searchsorted(shares, np.linspace(0, shares[-1], SAMPLED_ROWS, endpoint=False), side="right")
            samples = round(times.sum())
        rows = []
        for a, b in zip(starts[chosen], starts[chosen + 1], strict=True):
            lengths, labels = column["tokens"][a:b].tolist(), column["label_tokens"][a:b].tolist()
            rows.append(Row(int(column["tiles"][a]), int(column["prefix"][a]), tuple(lengths), tuple(labels)))
        return cls(tuple(rows), int(packed.max()), int(column["tiles"].max()), samples)

    @classmethod
    def default(cls, config: RunConfig, shape: ModelShape) -> "DataStatistics":
        """Assumptions for a data set that is not prepared yet, with images tiled as the run's ImageConfig says."""
        tiles = assumed_tiles(config, shape)
        prefix = TEMPLATE_TOKENS + round(tiles * shape.tokens_with_marks)
        lengths = (prefix + ASSUMED_QUESTION_TOKENS + ASSUMED_LABEL_TOKENS,) * ASSUMED_QUESTIONS
        row = Row(tiles, prefix, lengths, (ASSUMED_LABEL_TOKENS,) * ASSUMED_QUESTIONS)
        return cls((row,), packed_tokens(row), tiles, assumed=True)

    def with_max_tiles(self, limit: int, shape: ModelShape) -> "DataStatistics":
        """The statistics if image.max_tiles were `limit`: fewer tiles, and fewer image tokens in every conversation."""

        def tokens_gone(tiles: int) -> int:
            return round(max(tiles - limit, 0) * shape.tokens_with_marks)

        def fewer(row: Row) -> Row:
            gone = tokens_gone(row.tiles)
            return Row(
                min(row.tiles, limit),
                max(row.prefix - gone, 0),
                tuple(max(n - gone, 2) for n in row.lengths),
                row.labels,
            )

        rows = tuple(map(fewer, self.rows))
        return replace(
            self,
            rows=rows,
            longest=max(self.longest - tokens_gone(self.most_tiles), *map(packed_tokens, rows), 2),
            most_tiles=min(self.most_tiles, limit),
        )

    def loads(self, config: RunConfig, micro_batch: int) -> tuple[Load, Load]:
        """The mean and the largest micro-batch of at most `micro_batch` conversations, packed as the run says.

        The largest takes each number at its own worst: every sequence as long as the longest, as many tiles as five
        deviations above the mean.
        """
        limits = PlanLimits.with_micro_batch(config, micro_batch)
        groups = _packed_rows(self.rows, limits)
        while len({g.row for g in groups}) < 8 and sum(g.samples for g in groups) < 2 * micro_batch:
            after = groups[-1].row + 1  # a small sample is repeated
            groups += [g._replace(row=g.row + after) for g in groups]

        packed = config.data.packing != "none"
        batches = [_load(batch, limits.padded, packed) for batch in _micro_batches(groups, limits)]
        batches = batches[:-1] if len(batches) > 1 else batches
        mean = Load(*(sum(values) / len(batches) for values in zip(*map(_numbers, batches), strict=True)))
        tiles_deviation, tokens_deviation = (
            float(np.std([getattr(batch, name) for batch in batches])) for name in ("tiles", "tokens")
        )
        mean = replace(
            mean,
            tiles_spread=tiles_deviation / max(mean.tiles, 1.0),
            tokens_spread=tokens_deviation / max(mean.tokens, 1.0),
        )
        worst = Load(*map(max, zip(*map(_numbers, batches), strict=True)))
        return mean, self._largest(worst, mean.tiles + 5 * tiles_deviation, limits)

    def _largest(self, worst: Load, likely_tiles: float, limits: PlanLimits) -> Load:
        """The largest micro-batch that may come: `worst` of the sample, with the longest sequences of all data."""
        alone = max(n for row in self.rows for n in row.lengths)
        longest = self.longest if limits.group > 1 else alone
        longest = longest if limits.length is None else min(longest, limits.length)

        tokens = max(worst.sequences * longest if limits.padded else worst.tokens + longest, worst.tokens)
        tokens = max(min(tokens, limits.tokens), worst.tokens) if limits.tokens else tokens
        tiles = min(max(worst.tiles, likely_tiles, float(self.most_tiles)), worst.sequences * self.most_tiles)
        if limits.padded:
            pairs = max(worst.pairs, worst.sequences * longest**2 * (1 if worst.mask else 0.5))
        else:
            pairs = worst.pairs + longest**2 / 2
        mask = worst.sequences * longest**2 if worst.mask else 0.0
        return replace(worst, tokens=tokens, tiles=tiles, pairs=pairs, mask=mask)


def packed_tokens(row: Row) -> int:
    """The length of the packed sequence of a row: the shared prefix is counted once."""
    return packed_length(row.lengths, row.prefix)


def assumed_tiles(config: RunConfig, shape: ModelShape) -> int:
    """Tiles of a 640 x 480 photograph.

    Crops of the vision tower's size after scaling (data/tiles.py), and the global view.
    """
    side, image = shape.vision.image_size, config.image
    edge = image.longest_edge or 4 * side
    edge = edge if image.upscale else min(edge, math.ceil(ASSUMED_WIDTH / side) * side)
    columns = math.ceil(edge / side)
    rows = math.ceil(columns * ASSUMED_HEIGHT / ASSUMED_WIDTH)
    tiles = rows * columns + 1 if columns > 1 else 1
    return min(tiles, image.max_tiles) if image.max_tiles else tiles


class _Group(NamedTuple):
    """Conversations of one row that become one sequence."""

    row: int
    tokens: int
    samples: int
    label_tokens: int
    tiles: int


def _packed_rows(rows: Sequence[Row], limits: PlanLimits) -> list[_Group]:
    """The rows' conversations in groups, as the plan of an epoch packs them."""
    numbers = np.repeat(np.arange(len(rows)), [len(row.lengths) for row in rows])
    prefixes = np.array([row.prefix for row in rows])[numbers]
    tokens = np.array([length for row in rows for length in row.lengths])
    labels = np.array([label for row in rows for label in row.labels])
    groups = group_conversations(numbers, tokens, prefixes, limits)
    firsts, sums = numbers[groups.start].tolist(), np.add.reduceat(labels, groups.start).tolist()
    columns = zip(firsts, groups.tokens.tolist(), groups.samples.tolist(), sums, strict=True)
    return [_Group(row, length, samples, label, rows[row].tiles) for row, length, samples, label in columns]


def _micro_batches(groups: Sequence[_Group], limits: PlanLimits) -> list[list[_Group]]:
    """The groups in micro-batches, as the plan of an epoch fills them."""
    samples = np.array([g.samples for g in groups])
    packed = Groups(np.cumsum(samples) - samples, samples, np.array([g.tokens for g in groups]))
    order, held = fill_micro_batches(packed, limits)
    return [[groups[n] for n in batch] for batch in np.split(order, np.cumsum(held)[:-1])]


def _load(batch: Sequence[_Group], padded: bool, packed: bool) -> Load:
    lengths = [g.tokens for g in batch]
    tiles = sum({g.row: g.tiles for g in batch}.values())  # the groups of a row share its images
    samples, labels = sum(g.samples for g in batch), sum(g.label_tokens for g in batch)
    if not padded:
        return Load(samples, len(batch), sum(lengths), sum(n * n for n in lengths) / 2, 0.0, tiles, labels)

    area = float(len(batch) * max(lengths) ** 2)
    masked = packed and any(g.samples > 1 for g in batch)
    pairs, mask = (area, area) if masked else (area / 2, 0.0)
    return Load(samples, len(batch), len(batch) * max(lengths), pairs, mask, tiles, labels)


def _numbers(load: Load) -> tuple[Any, ...]:
    return load.samples, load.sequences, load.tokens, load.pairs, load.mask, load.tiles, load.label_tokens
