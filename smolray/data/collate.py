"""Groups of conversations -> Batch, one micro-batch of tensors. Packs their sequences and cuts their images into tiles.

In: Groups of shard rows, and the run's Encoder. Out: a Batch for training, for decoding, or for contrastive training.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
    """The output of the frozen part of the model for one image.

    `bits`: (tiles, tokens, hidden) of `dtype`, 16-bit types as uint16.
    """

    key: bytes  # a hash of the image
    grid: Grid
    bits: np.ndarray
    dtype: str


@dataclass(frozen=True)
class Group:
    """The conversations of one shard row that become one sequence."""

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

    Without `images` the batch has the number of tiles but no pixels.
    """
    packed = []
    for group in groups:
        grids = group.grids(encoder.tiler)
        packed.append(pack([branch for c in group.selected for branch in encoder.branches(c, grids) or ()]))

    ids = [c.id for group in groups for c in group.selected]
    return _collate(groups, packed, encoder, {"ids": ids}, flat=encoder.packing == "full", decode=images)


def collate_imageless(groups: Sequence[Group], encoder: Encoder) -> Batch:
    """The batch of `collate_training` for a pipeline stage that needs no images.

    No image is decoded; `pixel_values` are (T, 0, side, side).
    """
    return collate_training(groups, encoder, images=False)


def collate_prompts(groups: Sequence[Group], encoder: Encoder) -> Batch:
    """The prompts of `groups`, for decoding.

    `meta` has the id, key, type, question and reference answers of each conversation.
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


def collate_image_text(groups: Sequence[Group], encoder: Encoder) -> Batch:
    """The image and the text of each conversation as separate sequences, for contrastive training.

    The image side is the prompt about the image; the text side is the answer as a user turn. In a group each distinct
    one occurs once. `meta` has the question records and `pairs`: for each conversation the completions of its image and
    its text, and a key of each.
    """
    packed, records, pairs, count = [], [], [], 0
    for group in groups:
        grids, texts, images, about = group.grids(encoder.tiler), dict[bytes, int](), dict[bytes, int](), []
        for conversation in group.selected:
            record = question_record(conversation) | {"key": group.row.key}
            answer = Conversation(conversation.id, (Message("user", (Part("text", record["answer"]),)),))
            image_side = encoder.prompt(conversation, grids).tobytes()
            text_side = encoder.prompt(answer, ()).tobytes()
            about.append(
                (
                    images.setdefault(image_side, len(images)),
                    texts.setdefault(text_side, len(texts)),
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
    "training": collate_training,
    "image_text": collate_image_text,
    "imageless": collate_imageless,
    "prompts": collate_prompts,
}


def _untrained(tokens: Iterable[bytes]) -> list[Encoded]:
    """An Encoded without trained tokens for each sequence of int32 token ids."""
    return [Encoded(ids, np.zeros(len(ids), bool)) for ids in (np.frombuffer(one, np.int32) for one in tokens)]


def _key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def question_record(conversation: Conversation) -> dict[str, Any]:
    """What an evaluation needs of a conversation: the last question, the trained answer and all reference answers.

    In preference data the trained answer is the chosen one.
    """
    messages = [*conversation.messages, *conversation.chosen]
    last = max((i for i, m in enumerate(messages) if m.role == "assistant" and m.trained), default=len(messages))
    turns = [m for m in messages[:last] if m.role != "assistant"]
    answer = messages[last].text.strip() if last < len(messages) else ""

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
    """The tensors of packed groups: end to end in one row with `flat`, otherwise each group in a row of its own."""
    lengths = np.array([len(p.input_ids) for p in packed])
    # Where each group starts among the flat positions: behind the one before it, or in its row.
    offsets = np.cumsum(lengths) - lengths if flat else np.arange(len(packed)) * lengths.max()
    shape = (1, lengths.sum()) if flat else (len(packed), lengths.max())
    completions = np.cumsum([0, *(len(p.ends) for p in packed)])
    tiles = _collate_tiles(groups, packed, encoder, decode)
    reference = [
        logp for group in groups if group.reference for c in group.conversations for logp in group.reference[c]
    ]

    input_ids = _filled(shape, encoder.pad_token_id, [p.input_ids for p in packed], offsets)
    meta["tokens"] = int(lengths.sum())
    # found here: on the GPU the host would have to wait for it
    meta["tiles_in_order"] = bool(np.array_equal(tiles.order, np.arange(tiles.distinct)))
    meta["branched"] = any(int(p.branch.max()) > 0 for p in packed)
    return Batch(
        input_ids=input_ids,
        position_ids=_filled(shape, 0, [p.position_ids for p in packed], offsets),
        branch=_filled(shape, -1, [p.branch for p in packed], offsets),
        lengths=torch.from_numpy(lengths.astype(np.int64) if flat else np.zeros(0, np.int64)),
        pixel_values=tiles.pixel_values,
        features=tiles.features,
        reference_logps=torch.tensor(reference, dtype=torch.float32),
        tile_order=torch.from_numpy(tiles.order),
        target_positions=_shifted([p.target_positions for p in packed], offsets),
        target_ids=torch.from_numpy(np.concatenate([p.target_ids for p in packed]).astype(np.int64)),
        target_completion=_shifted([p.target_branch for p in packed], completions[:-1]),
        ends=_shifted([p.ends for p in packed], offsets),
        image_positions=torch.nonzero(input_ids.flatten() == encoder.image_token_id).flatten(),
        meta=meta,
    )


class _Tiles(NamedTuple):
    """The tiles of a batch, each distinct image once: as pixels or as features, the other one empty."""

    pixel_values: torch.Tensor
    features: torch.Tensor
    order: np.ndarray  # (tiles placed,) int64: which tile fills the next image tokens
    distinct: int


def _collate_tiles(groups: Sequence[Group], packed: Sequence[Packed], encoder: Encoder, decode: bool) -> _Tiles:
    tiles: list[np.ndarray] = []
    numbers: dict[bytes, np.ndarray] = {}  # image, or its hash -> numbers of its tiles
    order: list[np.ndarray] = []
    count = 0
    for group, sequence in zip(groups, packed, strict=True):
        features = {f.key: f for f in group.features}
        keys = [f.key for f in group.features] or group.row.images
        if not keys:
            continue

        for key in keys:
            if key not in numbers:
                tiles.append(features[key].bits if features else _tiles_of(key, encoder.tiler, decode))
                numbers[key] = np.arange(count, count + len(tiles[-1]))
                count += len(tiles[-1])

        order += _tiles_by_branch(np.concatenate([numbers[key] for key in keys]), sequence, encoder)

    side = encoder.tiler.side
    pixel_values, frozen = torch.zeros(0, 3, side, side, dtype=torch.uint8), torch.zeros(0, 0, 0)
    dtype = next((f.dtype for group in groups for f in group.features), None)
    if tiles:
        content = torch.from_numpy(np.concatenate(tiles))
        if dtype is None:
            pixel_values = content
        else:
            frozen = content.view(DTYPES[dtype])

    placed = np.concatenate(order).astype(np.int64) if order else np.zeros(0, np.int64)
    return _Tiles(pixel_values, frozen, placed, count)


def _tiles_by_branch(of_row: np.ndarray, sequence: Packed, encoder: Encoder) -> list[np.ndarray]:
    """The row's tiles in the order in which a sequence places them.

    The prefix holds the first tiles. Every branch continues behind it, with as many tiles as it has tokens for.
    """
    image_tokens = sequence.branch[sequence.input_ids == encoder.image_token_id]
    placed = np.bincount(image_tokens, minlength=1) // encoder.processor.image_seq_len
    return [of_row[: placed[0]], *(of_row[placed[0] : placed[0] + rest] for rest in placed[1:])]


def _tiles_of(image: bytes, tiler: Tiler, decode: bool) -> np.ndarray:
    """(tiles, 3, side, side) uint8; without `decode` (tiles, 0, side, side), which has their number and no pixels."""
    if decode:
        return tiler.tiles(image)
    return np.zeros((tiler.grid(*image_size(image)).tiles, 0, tiler.side, tiler.side), np.uint8)


def _filled(shape: tuple[int, int], padding: int, parts: Sequence[np.ndarray], offsets: np.ndarray) -> torch.Tensor:
    """(B, L) int64 of `padding`, with each part at its flat position."""
    whole = np.full(shape, padding, np.int64)
    for part, offset in zip(parts, offsets, strict=True):
        whole.reshape(-1)[offset : offset + len(part)] = part
    return torch.from_numpy(whole)


def _shifted(positions: list[np.ndarray], offsets: np.ndarray) -> torch.Tensor:
    """All positions, each group's moved to where the group starts: (positions,) int64."""
    return torch.from_numpy(np.concatenate([p.astype(np.int64) + o for p, o in zip(positions, offsets, strict=True)]))
