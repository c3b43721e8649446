"""How conversations are packed into groups and groups fill micro-batches: numbers in, numbers out.

The plan of an epoch (plan.py) and the estimates of the planner use the same functions, so an estimate is of what will
be trained. This module imports neither torch nor transformers: the planner must start fast.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from smolray.config import AUTO_LENGTHS, RunConfig

WINDOW = 8  # groups among which the next one of a micro-batch is looked for


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
        """The limits that a run sets."""
        return cls.with_micro_batch(config, config.train.per_device_train_batch_size)

    @classmethod
    def with_micro_batch(cls, config: RunConfig, samples: int) -> "PlanLimits":
        """The limits of a run whose micro-batches hold at most `samples` conversations."""
        data = config.data
        group = 1 if data.packing == "none" else min(data.max_questions_per_image, samples)
        # auto is a number once the data are indexed (data/max_length.py); until then, its least
        length = AUTO_LENGTHS[0] if data.max_length == "auto" else data.max_length
        return cls(samples, config.train.micro_batch_tokens, group, length, data.packing != "full")


@dataclass(frozen=True)
class Groups:
    """Groups of neighbouring conversations of one shard row, which become one sequence each: (groups,) int64 arrays."""

    start: np.ndarray  # the first conversation of each
    samples: np.ndarray  # its conversations
    tokens: np.ndarray  # of its packed sequence

    def __len__(self) -> int:
        return len(self.start)


def packed_length(lengths: Sequence[int], prefix: int) -> int:
    """Tokens of the packed sequence of conversations of these lengths, whose first `prefix` tokens are shared."""
    return sum(lengths) - prefix * (len(lengths) - 1)


def group_conversations(rows: np.ndarray, tokens: np.ndarray, prefixes: np.ndarray, limits: PlanLimits) -> Groups:
    """Pack neighbouring conversations of one row as far as the limits allow.

    For each conversation, in order: the number of its row, its tokens, and the prefix that its row shares.
    """
    new_row = np.ones(len(rows), bool)
    new_row[1:] = rows[1:] != rows[:-1]
    first = np.flatnonzero(new_row)
    in_row = np.arange(len(rows)) - np.repeat(first, np.diff(np.append(first, len(rows))))
    starts = in_row % limits.group == 0  # right wherever no limit of tokens is met
    groups = _groups(starts, tokens, prefixes)

    allowed = min((n for n in (limits.length, limits.tokens) if n is not None), default=None)
    if allowed is None or not (too_long := (groups.tokens > allowed) & (groups.samples > 1)).any():
        return groups
    numbers = np.cumsum(new_row) - 1
    bounds = np.append(first, len(rows)).tolist()
    for number in np.unique(numbers[groups.start[too_long]]).tolist():
        begin, end = bounds[number], bounds[number + 1]
        starts[begin:end] = _cut(tokens[begin:end].tolist(), int(prefixes[begin]), allowed, limits.group)
    return _groups(starts, tokens, prefixes)


def _groups(starts: np.ndarray, tokens: np.ndarray, prefixes: np.ndarray) -> Groups:
    """The groups that begin where `starts` is true."""
    start = np.flatnonzero(starts)
    samples = np.diff(np.append(start, len(starts)))
    total = np.add.reduceat(tokens, start, dtype=np.int64) if len(start) else np.zeros(0, np.int64)
    return Groups(start, samples, total - prefixes[start].astype(np.int64) * (samples - 1))


def _cut(tokens: list[int], prefix: int, allowed: int, most: int) -> list[bool]:
    """Where a group begins among the conversations of one row."""
    starts, length, count = [True], tokens[0], 1
    for one in tokens[1:]:
        length, count = packed_length((length, one), prefix), count + 1
        if count > most or length > allowed:
            length, count = one, 1
        starts.append(count == 1)
    return starts


def fill_micro_batches(groups: Groups, limits: PlanLimits, window: int = WINDOW) -> tuple[np.ndarray, np.ndarray]:
    """The groups in the order of the micro-batches, and how many each micro-batch has.

    The first group that waits opens a micro-batch; of the next `window` groups those that fit are added.
    """
    if (each := even_fill(groups, limits)) is not None:
        counts = np.full(-(-len(groups) // each), each)
        counts[-1:] = len(groups) - each * (len(counts) - 1)
        return np.arange(len(groups)), counts

    samples, tokens = groups.samples.tolist(), groups.tokens.tolist()
    most, budget = limits.samples, limits.tokens if limits.tokens is not None else math.inf
    order: list[int] = []
    sizes: list[int] = []
    waiting: list[int] = []
    coming = 0
    while True:
        more = min(coming + window - len(waiting), len(samples))
        waiting += range(coming, more)
        coming = max(coming, more)
        if not waiting:
            return np.array(order, np.int64), np.array(sizes, np.int64)

        at = longest = total = count = held = 0
        while at < len(waiting) and count < most:
            group = waiting[at]
            length = tokens[group]
            if held and (
                count + samples[group] > most
                or (max(longest, length) * (held + 1) if limits.padded else total + length) > budget
            ):
                at += 1
                continue
            order.append(group)
            del waiting[at]
            held, count, total = held + 1, count + samples[group], total + length
            longest = length if length > longest else longest
            if coming < len(samples):
                waiting.append(coming)
                coming += 1
        sizes.append(held)


def even_fill(groups: Groups, limits: PlanLimits) -> int | None:
    """The number of groups in every micro-batch but the last, where only their count limits it; else None.

    All groups are alike there, and their order does not matter.
    """
    if not len(groups) or groups.samples.min() != (size := int(groups.samples.max())):
        return None
    each = max(1, limits.samples // size)
    fits = limits.tokens is None or each * int(groups.tokens.max()) <= limits.tokens
    return each if fits or each == 1 else None
