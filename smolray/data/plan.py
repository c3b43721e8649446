"""The order of an epoch, laid before it starts and the same for any number of workers.

In: the index, a seed and an epoch. Out: EpochPlan: micro-batches in one order, each a list of groups (conversations of
one row that are packed together). An optimizer step takes `global_batch` of them; each worker a contiguous run of the
step. A position in training is (epoch, micro-batches consumed), so nothing is lost or seen twice when the number of
workers changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa

from smolray.config import RunConfig
from smolray.data.pack import packed_length

WINDOW = 8  # groups that wait to be the one that fills a micro-batch


class PlanError(ValueError):
    """The data cannot be laid out as asked; the message says what is in the way."""


@dataclass(frozen=True)
class GroupSpec:
    """Conversations of one shard row, by where the row stands."""

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
class PlanLimits:
    """How micro-batches are filled."""

    samples: int  # conversations in a micro-batch, at most
    tokens: int | None  # padded tokens in a micro-batch, at most
    group: int  # conversations packed into one sequence, at most
    length: int | None = None  # tokens of a packed sequence, at most
    padded: bool = True  # sequences are rows of equal length; otherwise they lie end to end

    @classmethod
    def of(cls, config: RunConfig) -> "PlanLimits":
        train, data = config.train, config.data
        group = 1 if data.packing == "none" else min(data.max_questions_per_image, train.per_device_train_batch_size)
        return cls(
            train.per_device_train_batch_size, train.micro_batch_tokens, group, data.max_length, data.packing != "full"
        )


@dataclass(frozen=True)
class EpochPlan:
    """Flat arrays: micro-batch m holds groups batch_start[m]:batch_start[m+1], group g the lines
    group_start[g]:group_start[g+1].
    """

    index: pa.Table
    lines: np.ndarray
    group_start: np.ndarray
    batch_start: np.ndarray
    label_tokens: np.ndarray  # per micro-batch
    chosen_tokens: np.ndarray  # per micro-batch, of preference data
    tokens: np.ndarray  # per micro-batch, padding included

    def __len__(self) -> int:
        return len(self.batch_start) - 1

    @property
    def samples(self) -> int:
        return len(self.lines)

    def samples_in(self, run: range) -> int:
        """Conversations in a run of micro-batches."""
        first, last = (self.group_start[self.batch_start[n]] for n in (run.start, run.stop))
        return int(last - first)

    def steps(self, global_batch: int) -> int:
        return -(-len(self) // global_batch)

    def micro_batch(self, number: int) -> MicroBatchSpec:
        groups = []
        for g in range(self.batch_start[number], self.batch_start[number + 1]):
            lines = self.lines[self.group_start[g] : self.group_start[g + 1]]
            shard, row_group, row = (int(self._column(c)[lines[0]]) for c in ("shard", "row_group", "row"))
            groups.append(
                GroupSpec(
                    shard, row_group, row, conversations=tuple(int(c) for c in self._column("conversation")[lines])
                )
            )
        return MicroBatchSpec(number, tuple(groups))

    def _column(self, name: str) -> np.ndarray:
        return self.index[name].chunk(0).to_numpy() if self.index[name].num_chunks == 1 else self.index[name].to_numpy()


def share(micro_batches: range, rank: int, counts: Sequence[int]) -> range:
    """The contiguous run of a step that falls to `rank`; `counts`: how many each worker takes."""
    first = sum(counts[:rank])
    return micro_batches[first : first + counts[rank]]


def check_kind(index: pa.Table, method: str) -> None:
    """Raise PlanError where the data are not what the method learns from: pairs of a chosen and a rejected answer
    (dpo), or single answers.
    """
    pairs = method == "dpo"
    told, kept = index["chosen_tokens"].to_numpy() > 0, index["tokens"].to_numpy() > 0
    if wrong := int(((told != pairs) & kept).sum()):
        what = (
            "have no chosen and rejected answer, of method: dpo"
            if pairs
            else "are preference data (chosen / rejected), of method: dpo"
        )
        raise PlanError(f"{wrong} of {int(kept.sum())} conversations {what}; found method: {method}")


def build_epoch(index: pa.Table, limits: PlanLimits, seed: int, epoch: int, shuffle: bool = True) -> EpochPlan:
    """Lay the micro-batches of one epoch.

    Row groups are permuted (their rows were shuffled over the whole data set when the shards were made), rows inside a
    group and conversations inside a row as well; micro-batches are filled from neighbours, so that each row group is
    read about once. Without `shuffle` everything stays in the order of the shards. Raises PlanError where no
    conversation is left to train on.
    """
    rng = np.random.default_rng([seed, epoch])
    column = {name: index[name].to_numpy() for name in index.column_names}
    kept = np.flatnonzero((column["tokens"] > 0) & (column["label_tokens"] > 0))
    if not len(kept):
        raise PlanError(
            f"none of {len(index)} conversations fits data.max_length; "
            "see `smolray preview`, raise data.max_length or lower image.max_tiles"
        )
    # One random number per row group, row and conversation orders the lines by all three at once.
    group_id = _runs(column["shard"], column["row_group"])
    row_id = _runs(column["shard"], column["row_group"], column["row"])
    if shuffle:
        keys = (rng.random(len(index)), rng.random(row_id[-1] + 1)[row_id], rng.random(group_id[-1] + 1)[group_id])
        kept = kept[np.lexsort(tuple(key[kept] for key in keys))]
    groups = _groups(row_id[kept].tolist(), column["tokens"][kept].tolist(), column["prefix"][kept].tolist(), limits)
    batches = _fill(groups, limits, WINDOW if shuffle else 1)
    order = [groups[n] for batch in batches for n in batch]
    lines = np.concatenate([kept[start:end] for start, end, _ in order])
    group_start = np.cumsum([0, *(end - start for start, end, _ in order)])
    batch_start = np.cumsum([0, *map(len, batches)])
    padded = [_laid([groups[n][2] for n in batch], limits) for batch in batches]
    first = group_start[batch_start[:-1]]
    label_sums, chosen_sums = (
        np.add.reduceat(column[name][lines], first) for name in ("label_tokens", "chosen_tokens")
    )
    return EpochPlan(index.combine_chunks(), lines, group_start, batch_start, label_sums, chosen_sums, np.array(padded))


def _groups(rows: list[int], tokens: list[int], prefix: list[int], limits: PlanLimits) -> list[tuple[int, int, int]]:
    """(start, end, tokens) of each packed group of neighbouring lines of one row."""
    allowed = min((n for n in (limits.length, limits.tokens) if n is not None), default=None)
    found, position = [], 0
    while position < len(rows):
        end, length = position + 1, tokens[position]
        while end < len(rows) and end - position < limits.group and rows[end] == rows[position]:
            longer = packed_length((length, tokens[end]), prefix[position])
            if allowed is not None and longer > allowed:
                break
            end, length = end + 1, longer
        found.append((position, end, length))
        position = end
    return found


def _fill(groups: list[tuple[int, int, int]], limits: PlanLimits, window: int) -> list[list[int]]:
    """Numbers of the groups of each micro-batch: the first that waits opens it, and of the next `window` those are
    added that fit.
    """
    batches: list[list[int]] = []
    waiting: list[int] = []
    coming = iter(range(len(groups)))
    while True:
        waiting += islice(coming, window - len(waiting))
        if not waiting:
            return batches
        batch: list[int] = []
        at = longest = total = count = 0
        while at < len(waiting) and count < limits.samples:
            start, end, length = groups[waiting[at]]
            laid = max(longest, length) * (len(batch) + 1) if limits.padded else total + length
            if batch and (count + end - start > limits.samples or (limits.tokens is not None and laid > limits.tokens)):
                at += 1
                continue
            batch.append(waiting.pop(at))
            longest, total, count = max(longest, length), total + length, count + end - start
            waiting += islice(coming, 1)
        batches.append(batch)


def _laid(lengths: list[int], limits: PlanLimits) -> int:
    """Tokens of a micro-batch of sequences of these lengths, padding included."""
    return max(lengths) * len(lengths) if limits.padded else sum(lengths)


def _runs(*columns: np.ndarray) -> np.ndarray:
    """Number the runs of equal lines: (lines,) int64, starting at 0."""
    changed = np.zeros(len(columns[0]), bool)
    for column in columns:
        changed[1:] |= column[1:] != column[:-1]
    return np.cumsum(changed)
