"""The shards as a data set for TRL's trainers.

In: an epoch plan and the shards. Out: TRL's conversational examples, in the order of the plan.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from torch.utils.data import Sampler

from smolray.data.plan import EpochPlans
from smolray.data.reader import ShardReader
from smolray.data.sample import Conversation, Message, ShardRow
from smolray.data.tiles import decode

CACHED_ROW_GROUPS = 16  # neighbours in the plan share row groups


class PlanOrder(Sampler[int]):
    """Index rows in the order of the epoch's plan."""

    def __init__(self, plans: EpochPlans):
        self.plans, self.epoch = plans, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.plans.samples

    def __iter__(self) -> Iterator[int]:
        return iter(self.plans[min(self.epoch, len(self.plans) - 1)].index_rows.tolist())


def shard_dataset(folder: str, index: pa.Table, pairs: bool) -> Dataset:
    """One example for each index row. Its shard row is read when the trainer fetches it."""
    reader = ShardReader.open(folder)
    places = np.stack([index[name].to_numpy() for name in ("shard", "row_group", "row", "conversation")], axis=1)
    cached: dict[tuple[int, int], list[ShardRow]] = {}

    def rows(shard: int, row_group: int) -> list[ShardRow]:
        if (shard, row_group) not in cached:
            while len(cached) >= CACHED_ROW_GROUPS:
                cached.pop(next(iter(cached)))
            cached[shard, row_group] = reader.row_group(shard, row_group)
        return cached[shard, row_group]

    def read(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        examples = []
        for shard, row_group, row, conversation in places[batch["row"]].tolist():
            found = rows(shard, row_group)[row]
            examples.append(example(found, found.conversations[conversation], pairs))
        return {name: [one[name] for one in examples] for name in examples[0]}

    return Dataset.from_dict({"row": np.arange(len(places))}).with_transform(read)


def example(row: ShardRow, conversation: Conversation, pairs: bool) -> dict[str, Any]:
    """TRL's conversational format: images (PIL), prompt, and completion or chosen and rejected.

    The last trained assistant turn is the completion.
    """
    images = {"images": [decode(image) for image in row.images]}
    if pairs:
        endings = {"chosen": conversation.chosen, "rejected": conversation.rejected}
        return (
            images
            | {"prompt": _turns(conversation.messages)}
            | {name: _turns(ending) for name, ending in endings.items()}
        )
    last = max(i for i, message in enumerate(conversation.messages) if message.role == "assistant" and message.trained)
    return images | {
        "prompt": _turns(conversation.messages[:last]),
        "completion": _turns(conversation.messages[last : last + 1]),
    }


def _turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [
        {
            "role": m.role,
            "content": [
                {"type": "image"} if p.type == "image" else {"type": "text", "text": p.text} for p in m.content
            ],
        }
        for m in messages
    ]
