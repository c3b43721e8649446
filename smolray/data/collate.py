"""Packed sequences and tiles -> Batch, one micro-batch of tensors; and its bytes, in which a Ray Data task hands it
over.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from smolray.data.batch import Batch
from smolray.data.encode import Encoded, Encoder
from smolray.data.pack import Packed, pack, pack_sides
from smolray.data.sample import Conversation, Message, Part, ShardRow
from smolray.data.tiles import Grid, Tiler, image_size
from smolray.pretrained import DTYPES


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """What the frozen part of the model made of one image.

    `bits`: (tiles, tokens, hidden) of `dtype`, 16-bit types as uint16.
    """

    key: bytes  # a hash of the image
    grid: Grid
    bits: np.ndarray
    dtype: str


@dataclass(frozen=True)
class Group:
    """What one sequence is made of: some conversations of one shard row."""

    row: ShardRow
    conversations: tuple[int, ...]
    features: tuple[ImageFeatures, ...] = ()  # one for each image, where they are read in place of `row.images`
    # the reference model's logps of chosen, rejected, of every conversation of the row
    reference: tuple[tuple[float, float], ...] = ()

    def grids(self, tiler: Tiler) -> list[Grid]:
        """How each image of the row is cut."""
        return [f.grid for f in self.features] or [tiler.grid(*image_size(image)) for image in self.row.images]

    @property
    def selected(self) -> list[Conversation]:
        return [self.row.conversations[i] for i in self.conversations]


def collate_training(groups: Sequence[Group], encoder: Encoder, images: bool = True) -> Batch:
    """The micro-batch of `groups`, with the ids of its conversations in `meta`.

    Without `images` tiles keep their number and nothing else.
    """
    packed = []
    for group in groups:
        grids = group.grids(encoder.tiler)
        packed.append(pack([branch for c in group.selected for branch in encoder.branches(c, grids) or ()]))
    ids = [c.id for group in groups for c in group.selected]
    return _collate(groups, packed, encoder, {"ids": ids}, flat=encoder.packing == "full", decode=images)


def collate_imageless(groups: Sequence[Group], encoder: Encoder) -> Batch:
    """What `collate_training` gives to a stage of a pipeline that looks at no image: none is decoded, `pixel_values`
    are (T, 0, side, side).
    """
    return collate_training(groups, encoder, images=False)


def collate_prompts(groups: Sequence[Group], encoder: Encoder) -> Batch:
    """The prompts of `groups` for decoding, with id, key, type, question and reference answers of each conversation in
    `meta`.
    """
    packed, records = [], []
    for group in groups:
        grids = group.grids(encoder.tiler)
        rows = []
        for conversation in group.selected:
            ids = encoder.prompt(conversation, grids)
            rows.append(Encoded(ids, np.zeros(len(ids), bool)))
            records.append(question_record(conversation) | {"key": group.row.key})
        packed.append(pack(rows))
    return _collate(groups, packed, encoder, {"ids": [r["id"] for r in records], "records": records}, flat=False)


def collate_pairs(groups: Sequence[Group], encoder: Encoder) -> Batch:
    """Image and text of each conversation apart, for contrastive training: what is asked about an image, and the answer
    as a turn of its own.

    In a group either is there once. `meta` has question records and, as `pairs`, for each conversation the completions
    that are its image and its text and a key of either.
    """
    packed, records, pairs, count = [], [], [], 0
    for group in groups:
        grids, texts, images, about = group.grids(encoder.tiler), dict[bytes, int](), dict[bytes, int](), []
        for conversation in group.selected:
            record = question_record(conversation) | {"key": group.row.key}
            said = Conversation(conversation.id, (Message("user", (Part("text", record["answer"]),)),))
            shown, told = encoder.prompt(conversation, grids).tobytes(), encoder.prompt(said, ()).tobytes()
            about.append(
                (
                    images.setdefault(shown, len(images)),
                    texts.setdefault(told, len(texts)),
                    _key(group.row.key),
                    _key(record["answer"]),
                )
            )
            records.append(record)
        packed.append(pack_sides(_untrained(texts), _untrained(images)))
        pairs += [[count + len(texts) + image, count + text, *keys] for image, text, *keys in about]
        count += len(texts) + len(images)
    meta = {"ids": [r["id"] for r in records], "records": records, "pairs": pairs}
    return _collate(groups, packed, encoder, meta, flat=encoder.packing == "full")


COLLATE: dict[str, Callable[[Sequence[Group], Encoder], Batch]] = {
    "sft": collate_training,
    "dpo": collate_training,
    "retrieval": collate_pairs,
    "imageless": collate_imageless,
    "prompts": collate_prompts,
}


def _untrained(tokens: Iterable[bytes]) -> list[Encoded]:
    """Of each sequence of int32 token ids."""
    return [Encoded(ids, np.zeros(len(ids), bool)) for ids in (np.frombuffer(one, np.int32) for one in tokens)]


def _key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def question_record(conversation: Conversation) -> dict[str, Any]:
    """What an evaluation asks and compares with: the last question, the trained (of preference data: the chosen)
    answer, all reference answers.
    """
    messages = (*conversation.messages, *conversation.chosen)
    turns = [m for m in messages if m.role != "assistant"]
    answer = next((m.text for m in reversed(messages) if m.role == "assistant"), "").strip()
    answers = list(conversation.answers) or [answer]
    question = turns[-1].text.strip() if turns else ""
    return {
        "id": conversation.id,
        "type": conversation.type,
        "question": question,
        "answer": answer,
        "answers": answers,
    }


def _collate(
    groups: Sequence[Group],
    packed: Sequence[Packed],
    encoder: Encoder,
    meta: dict[str, Any],
    flat: bool,
    decode: bool = True,
) -> Batch:
    lengths = np.array([len(p.input_ids) for p in packed])
    # Where each group starts in the positions laid flat: behind the one before it, or in a row of its own.
    offsets = np.cumsum(lengths) - lengths if flat else np.arange(len(packed)) * lengths.max()
    shape = (1, lengths.sum()) if flat else (len(packed), lengths.max())
    input_ids = np.full(shape, encoder.pad_token_id, np.int64)
    position_ids = np.zeros(shape, np.int64)
    branch = np.full(shape, -1, np.int64)
    tiles: list[np.ndarray] = []
    numbers: dict[bytes, np.ndarray] = {}  # image, or its hash -> numbers of its tiles
    order: list[np.ndarray] = []
    count = 0
    for i, (group, p) in enumerate(zip(groups, packed, strict=True)):
        place = slice(offsets[i], offsets[i] + len(p.input_ids))
        for whole, part in ((input_ids, p.input_ids), (position_ids, p.position_ids), (branch, p.branch)):
            whole.reshape(-1)[place] = part
        images = {f.key: f for f in group.features}
        keys = [f.key for f in group.features] or group.row.images
        if not keys:
            continue
        for key in keys:
            if key not in numbers:
                tiles.append(
                    images[key].bits
                    if images
                    else encoder.tiler.tiles(key)
                    if decode
                    else _undecoded(key, encoder.tiler)
                )
                numbers[key] = np.arange(count, count + len(tiles[-1]))
                count += len(tiles[-1])
        of_row = np.concatenate([numbers[key] for key in keys])
        # The prefix holds the first of the row's tiles; every branch goes on behind it, with as many as it has tokens
        # for.
        placed = (
            np.bincount(p.branch[p.input_ids == encoder.image_token_id], minlength=1) // encoder.processor.image_seq_len
        )
        order.append(of_row[: placed[0]])
        order += [of_row[placed[0] : placed[0] + rest] for rest in placed[1:]]
    side, completions = encoder.tiler.side, np.cumsum([0, *(len(p.ends) for p in packed)])
    no_pixels, no_features = torch.zeros(0, 3, side, side, dtype=torch.uint8), torch.zeros(0, 0, 0)
    content = torch.from_numpy(np.concatenate(tiles)) if tiles else None
    dtype = next((f.dtype for group in groups for f in group.features), None)
    reference = [
        logp for group in groups if group.reference for c in group.conversations for logp in group.reference[c]
    ]
    meta["tokens"] = int(lengths.sum())
    placed_tiles = np.concatenate(order).astype(np.int64) if order else np.zeros(0, np.int64)
    # said here: a look at the GPU would wait for it
    meta["tiles_in_order"] = bool(np.array_equal(placed_tiles, np.arange(count)))
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        branch=torch.from_numpy(branch),
        lengths=torch.from_numpy(lengths.astype(np.int64) if flat else np.zeros(0, np.int64)),
        pixel_values=content if content is not None and dtype is None else no_pixels,
        features=content.view(DTYPES[dtype]) if content is not None and dtype is not None else no_features,
        reference_logps=torch.tensor(reference, dtype=torch.float32),
        tile_order=torch.from_numpy(placed_tiles),
        target_positions=_flat([p.target_positions for p in packed], offsets),
        target_ids=torch.from_numpy(np.concatenate([p.target_ids for p in packed]).astype(np.int64)),
        target_completion=_flat([p.target_branch for p in packed], completions[:-1]),
        ends=_flat([p.ends for p in packed], offsets),
        meta=meta,
    )


def _undecoded(image: bytes, tiler: Tiler) -> np.ndarray:
    return np.zeros((tiler.grid(*image_size(image)).tiles, 0, tiler.side, tiler.side), np.uint8)


def _flat(positions: list[np.ndarray], offsets: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([p.astype(np.int64) + o for p, o in zip(positions, offsets, strict=True)]))
