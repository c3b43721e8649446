"""The order of an epoch, built before it starts and the same for any number of workers.

In: the index, a seed and an epoch. Out: EpochPlan: micro-batches in one order, each a list of groups (conversations of
one row that are packed together). An optimizer step takes `global_batch` of them; each worker takes a contiguous slice
of the step. A position in training is (epoch, micro-batches consumed), so nothing is lost or seen twice when the number
of workers changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import pyarrow as pa

from smolray.config import METHODS, RunConfig
from smolray.data.fill import WINDOW, Groups, even_fill, fill_micro_batches, group_conversations
from smolray.data.fill import PlanLimits as PlanLimits
from smolray.data.repeats import Repeats, kept


class PlanError(ValueError):
    """No plan can be built for this data and these settings; the message says why."""


@dataclass(frozen=True)
class GroupSpec:
    """Conversations of one shard row, and the place of the row in the shards."""

    shard: int
    row_group: int
    row: int
    conversations: tuple[int, ...]


@dataclass(frozen=True)
class MicroBatchSpec:
    """A micro-batch of the plan: its number in the epoch and its groups."""

    number: int
    groups: tuple[GroupSpec, ...]


@dataclass(frozen=True)
class EpochPlan:
    """The micro-batches of an epoch as flat arrays.

    Micro-batch m holds the groups batch_start[m]:batch_start[m+1]. Group g holds
    index_rows[group_start[g]:group_start[g+1]].
    """

    index: pa.Table
    index_rows: np.ndarray  # rows of `index` in the order of training
    group_start: np.ndarray
    batch_start: np.ndarray
    label_tokens: np.ndarray  # per micro-batch
    chosen_tokens: np.ndarray  # per micro-batch, of preference data
    tokens: np.ndarray  # per micro-batch, padding included
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.batch_start) - 1

    @property
    def samples(self) -> int:
        return len(self.index_rows)

    def samples_in(self, micro_batches: range) -> int:
        """Conversations in these micro-batches."""
        first, last = (self.group_start[self.batch_start[n]] for n in (micro_batches.start, micro_batches.stop))
        return int(last - first)

    def steps(self, global_batch: int) -> int:
        return -(-len(self) // global_batch)

    def micro_batch(self, number: int) -> MicroBatchSpec:
        groups = []
        for g in range(self.batch_start[number], self.batch_start[number + 1]):
            index_rows = self.index_rows[self.group_start[g] : self.group_start[g + 1]]
            shard, row_group, row = (int(self._column(c)[index_rows[0]]) for c in ("shard", "row_group", "row"))
            conversations = tuple(int(c) for c in self._column("conversation")[index_rows])
            groups.append(GroupSpec(shard, row_group, row, conversations))
        return MicroBatchSpec(number, tuple(groups))

    def _column(self, name: str) -> np.ndarray:
        return self.index[name].chunk(0).to_numpy() if self.index[name].num_chunks == 1 else self.index[name].to_numpy()


class EpochPlans(Sequence[EpochPlan]):
    """The plans of all epochs of a run. Each is built when it is reached, and only the newest is kept.

    Raises PlanError where no conversation is left to train on.
    """

    def __init__(self, index: pa.Table, limits: PlanLimits, seed: int, epochs: int, repeats: Sequence[float] = ()):
        self.table, self.limits, self.seed, self.epochs = index.combine_chunks(), limits, seed, epochs
        self.repeats = Repeats(self.table, repeats, seed) if repeats else None
        trained = kept(self.table)
        self.samples = int((self.repeats.counts(0) if self.repeats else trained).sum())  # of the first epoch
        self._newest: tuple[int, EpochPlan] | None = None
        if not trained.any():
            raise PlanError(
                f"none of {len(index)} conversations fits data.max_length; "
                "see `smolray preview`, raise data.max_length or lower image.max_tiles"
            )

    def __len__(self) -> int:
        return self.epochs

    @overload
    def __getitem__(self, epoch: int) -> EpochPlan: ...
    @overload
    def __getitem__(self, epoch: slice) -> Sequence[EpochPlan]: ...
    def __getitem__(self, epoch: int | slice) -> EpochPlan | Sequence[EpochPlan]:
        if isinstance(epoch, slice):
            raise TypeError("plans are built one at a time")
        if not 0 <= epoch < self.epochs:
            raise IndexError(epoch)
        if self._newest is None or self._newest[0] != epoch:
            self._newest = None  # the old one goes before the new one is built
            self._newest = (epoch, build_epoch(self.table, self.limits, self.seed, epoch, repeats=self.repeats))
        return self._newest[1]

    @property
    def micro_batches(self) -> int | None:
        """The micro-batches of every epoch, where their number does not depend on the order; else None.

        So it is where all groups are one conversation, and only their count limits a micro-batch.
        """
        if self.repeats and not self.repeats.whole:
            return None
        column = {name: self.table[name].to_numpy()[kept(self.table)] for name in ("shard", "row_group", "row")}
        rows = _slice_numbers(*column.values())
        if self.limits.group > 1 and len(rows) > 1 and (rows[1:] == rows[:-1]).any():
            return None
        tokens = self.table["tokens"].to_numpy()[kept(self.table)]
        each = even_fill(Groups(np.arange(self.samples), np.ones(self.samples, np.int64), tokens), self.limits)
        return None if each is None else -(-self.samples // each)


def epoch_plans(index: pa.Table, config: RunConfig) -> EpochPlans:
    """The plans of a run: of `train.num_train_epochs`, or of as many epochs as `train.max_steps` takes at most."""
    epochs = config.train.max_steps if config.train.max_steps > 0 else config.train.num_train_epochs
    return EpochPlans(index, PlanLimits.of(config), config.seed, epochs, config.data.repeats)


def share(micro_batches: range, rank: int, counts: Sequence[int]) -> range:
    """The contiguous slice of a step that `rank` takes; `counts`: how many micro-batches each worker takes."""
    first = sum(counts[:rank])
    return micro_batches[first : first + counts[rank]]


def check_kind(index: pa.Table, method: str) -> None:
    """Raise PlanError where the data are not what the method learns from.

    It learns from pairs of a chosen and a rejected answer, or from single answers.
    """
    pairs = METHODS[method].pairs
    paired, kept = index["chosen_tokens"].to_numpy() > 0, index["tokens"].to_numpy() > 0
    wrong = int(((paired != pairs) & kept).sum())
    if not wrong:
        return

    methods = " or ".join(f"method={name}" for name, traits in METHODS.items() if traits.pairs != pairs)
    what = "have no chosen and rejected answer" if pairs else "are preference data (chosen and rejected answers)"
    learns = "pairs of both" if pairs else "single answers"
    raise PlanError(
        f"{wrong} of {int(kept.sum())} conversations {what}, but method = {method} learns from {learns}; "
        f"train them with {methods}, or name other data"
    )


def build_epoch(
    index: pa.Table,
    limits: PlanLimits,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    repeats: Repeats | None = None,
) -> EpochPlan:
    """Build the micro-batches of one epoch.

    Row groups are permuted (their rows were shuffled over the whole data set when the shards were made), as are rows
    inside a group and conversations inside a row; micro-batches are filled from neighbours, so that each row group is
    read about once. Without `shuffle` everything stays in the order of the shards. With `repeats` a conversation may
    come several times, each time at another place, or in another epoch. Raises PlanError where no conversation is left
    to train on.
    """
    column = {name: index[name].to_numpy() for name in index.column_names}
    rows = np.flatnonzero(kept(index))
    if not len(rows):
        raise PlanError(
            f"none of {len(index)} conversations fits data.max_length; "
            "see `smolray preview`, raise data.max_length or lower image.max_tiles"
        )

    counts = repeats.counts(epoch) if repeats else None
    rows = rows if counts is None else rows[counts[rows] > 0]
    if not len(rows):
        raise PlanError(
            f"epoch {epoch} has no conversation: data.repeats are too small for so few; raise the repeats in data.train"
        )

    # One random number for each row group, row and conversation orders the index rows by all three at once.
    rng = np.random.default_rng([seed, epoch])
    group_id = _slice_numbers(column["shard"], column["row_group"])
    row_id = _slice_numbers(column["shard"], column["row_group"], column["row"])
    place = row_id[rows]
    if shuffle:
        drawn = (rng.random(len(index)), rng.random(row_id[-1] + 1)[row_id], rng.random(group_id[-1] + 1)[group_id])
        keys = tuple(key[rows] for key in drawn)
        if counts is not None:
            rows, place, keys = _with_repeats(rows, counts, (row_id, group_id), keys, rng)
        by_key = np.lexsort(keys)
        rows, place = rows[by_key], place[by_key]

    groups = group_conversations(place, column["tokens"][rows], column["prefix"][rows], limits)
    order, held = fill_micro_batches(groups, limits, WINDOW if shuffle else 1)
    group_start, batch_start = _sums(groups.samples[order]), _sums(held)
    # conversation k of a group is k behind its first
    behind = np.arange(len(rows)) - np.repeat(group_start[:-1], groups.samples[order])
    index_rows = rows[np.repeat(groups.start[order], groups.samples[order]) + behind]

    lengths = groups.tokens[order]
    longest = np.maximum.reduceat(lengths, batch_start[:-1])
    tokens = longest * held if limits.padded else np.add.reduceat(lengths, batch_start[:-1])
    first = group_start[batch_start[:-1]]
    label_sums, chosen_sums = (
        np.add.reduceat(column[name][index_rows], first) for name in ("label_tokens", "chosen_tokens")
    )
    whole = index.combine_chunks()
    return EpochPlan(whole, index_rows, group_start, batch_start, label_sums, chosen_sums, tokens, epoch)


def _with_repeats(
    rows: np.ndarray,
    counts: np.ndarray,
    places: tuple[np.ndarray, np.ndarray],
    keys: tuple[np.ndarray, ...],
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
    """The index rows with as many copies as `counts` says.

    Each copy has a row of its own, so that it is not packed with the others, and random numbers of its own.
    `places`: the number of each index row's row and row group. Out: index rows, rows, random numbers.
    """
    row_id, group_id = places
    found, place, numbers = [rows], [row_id[rows]], [keys]
    first = int(row_id[-1]) + 1
    for copy in range(1, int(counts.max())):
        more = rows[counts[rows] > copy]
        own_rows, own_groups = _slice_numbers(row_id[more]), _slice_numbers(group_id[more])
        found.append(more)
        place.append(own_rows + first)
        numbers.append(
            (
                rng.random(len(more)),
                rng.random(own_rows[-1] + 1)[own_rows],
                rng.random(own_groups[-1] + 1)[own_groups],
            )
        )
        first += int(own_rows[-1]) + 1
    merged = tuple(np.concatenate(part) for part in zip(*numbers, strict=True))
    return np.concatenate(found), np.concatenate(place), merged


def _sums(counts: np.ndarray) -> np.ndarray:
    """(n + 1,) int64: where each of n parts of these sizes begins, and the end."""
    return np.concatenate([[0], np.cumsum(counts)])


def _slice_numbers(*columns: np.ndarray) -> np.ndarray:
    """Number the slices of equal neighbouring index rows: (index rows,) int64, starting at 0."""
    changed = np.zeros(len(columns[0]), bool)
    for column in columns:
        changed[1:] |= column[1:] != column[:-1]
    return np.cumsum(changed)
