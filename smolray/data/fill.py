"""How conversations are packed into groups and groups fill micro-batches: numbers in, numbers out.

The plan of an epoch (plan.py) and the estimates of the planner use the same functions, so an estimate is of what will
be trained. This module imports neither torch nor transformers: the planner must start fast.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

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


class PackedGroup(NamedTuple):
    """Neighbouring conversations `start` to `stop` of one shard row, which become one sequence of `tokens`."""

    start: int
    stop: int
    tokens: int

    @property
    def samples(self) -> int:
        """Its conversations."""
        return self.stop - self.start


def packed_length(lengths: Sequence[int], prefix: int) -> int:
    """Tokens of the packed sequence of conversations of these lengths, whose first `prefix` tokens are shared."""
    return sum(lengths) - prefix * (len(lengths) - 1)


def group_conversations(
    rows: Sequence[int], tokens: Sequence[int], prefixes: Sequence[int], limits: PlanLimits
) -> list[PackedGroup]:
    """Pack neighbouring conversations of one row as far as the limits allow.

    For each conversation, in order: the number of its row, its tokens, and the prefix that its row shares.
    """
    allowed = min((n for n in (limits.length, limits.tokens) if n is not None), default=None)
    groups: list[PackedGroup] = []
    start = 0
    while start < len(rows):
        stop, length = start + 1, tokens[start]
        while stop < len(rows) and stop - start < limits.group and rows[stop] == rows[start]:
            longer = packed_length((length, tokens[stop]), prefixes[start])
            if allowed is not None and longer > allowed:
                break
            stop, length = stop + 1, longer

        groups.append(PackedGroup(start, stop, length))
        start = stop
    return groups


def fill_micro_batches(groups: Sequence[PackedGroup], limits: PlanLimits, window: int = WINDOW) -> list[list[int]]:
    """Numbers of the groups of each micro-batch.

    The first group that waits opens a micro-batch; of the next `window` groups those that fit are added.
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
            group = groups[waiting[at]]
            size = max(longest, group.tokens) * (len(batch) + 1) if limits.padded else total + group.tokens
            too_many = count + group.samples > limits.samples or (limits.tokens is not None and size > limits.tokens)
            if batch and too_many:
                at += 1
                continue
            batch.append(waiting.pop(at))
            longest, total, count = max(longest, group.tokens), total + group.tokens, count + group.samples
            waiting += islice(coming, 1)
        batches.append(batch)


def padded_tokens(lengths: Sequence[int], limits: PlanLimits) -> int:
    """Tokens of a micro-batch of sequences of these lengths, padding included."""
    return max(lengths) * len(lengths) if limits.padded else sum(lengths)
