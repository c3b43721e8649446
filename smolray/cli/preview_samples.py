"""Samples as the model sees them: the trained tokens, the tokens of images, and what is left out.

In: rows of the shards and the run's encoder. Out: PreviewItems, and the text that is printed for one.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from PIL import Image
from rich.text import Text

from smolray.config import DataConfig
from smolray.data.encode import Encoded, EncodeError, Encoder
from smolray.data.fill import packed_length
from smolray.data.pack import common_prefix
from smolray.data.sample import Conversation, ShardRow
from smolray.data.tiles import Grid, image_size

NO_LIMIT = 10**9


@dataclass(frozen=True)
class Piece:
    """A slice of the sequence: its text, whether it counts in the loss, and whether it stands for an image."""

    text: str
    trained: bool = False
    image: bool = False


@dataclass(frozen=True)
class PreviewItem:
    """One conversation as the model sees it. `note` says why it is left out or cut, where it is."""

    id: str
    pieces: tuple[Piece, ...]
    tokens: int
    image_tokens: int
    label_tokens: int
    images: tuple[str, ...]  # size, format, tiles and tokens of each
    note: str = ""


def preview_item(row: ShardRow, conversation: Conversation, encoder: Encoder) -> PreviewItem:
    """One conversation of a row, encoded with the run's settings. One that they leave out is shown in full."""
    grids = [encoder.tiler.grid(*image_size(image)) for image in row.images]
    images = tuple(_describe(image, grid, encoder) for image, grid in zip(row.images, grids, strict=True))

    boundless = Encoder(encoder.processor, DataConfig(max_length=NO_LIMIT), encoder.tiler.config)
    encoded = boundless.branches(conversation, grids)
    assert encoded is not None  # it has no limit
    try:
        kept = encoder.branches(conversation, grids)
        note = _note(encoded[0], kept[0] if kept else None, encoder.max_length)
        encoded = kept or encoded
    except EncodeError as error:  # data.overlong = error: training would stop here
        note = str(error)

    pieces = [piece for number, branch in enumerate(encoded) for piece in _branch(branch, number, grids, encoder)]
    tokens = packed_length([len(e.input_ids) for e in encoded], common_prefix(encoded))
    image_tokens = int((encoded[0].input_ids == encoder.image_token_id).sum())
    labels = sum(e.label_tokens for e in encoded)
    return PreviewItem(conversation.id, tuple(pieces), tokens, image_tokens, labels, images, note)


def item_text(item: PreviewItem) -> Text:
    """The sample as printed: trained tokens green and in «guillemets», which a file shows too; an image as one word."""
    text = Text()
    text.append(harmless(item.id), style="bold")
    text.append(f"  {item.tokens} tokens, {item.image_tokens} of images, {item.label_tokens} trained\n", style="dim")
    for image in item.images:
        text.append(f"  image {image}\n", style="dim")
    if item.note:
        text.append(f"  {harmless(item.note)}\n", style="yellow")

    for piece in item.pieces:
        if piece.trained:
            body = piece.text.rstrip("\n")
            text.append(f"«{harmless(body)}{'↵' * (len(piece.text) - len(body))}»\n", style="bold green")
        else:
            text.append(harmless(piece.text), style="cyan" if piece.image else "")
    return text


def harmless(text: str) -> str:
    """The text with control characters spelt out: a data set must not control the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def _note(whole: Encoded, kept: Encoded | None, max_length: int) -> str:
    if kept is None:
        return f"left out: {len(whole.input_ids)} tokens, data.max_length = {max_length}"
    if not kept.label_tokens:
        return "left out: no token to train on"
    if len(kept.input_ids) < len(whole.input_ids):
        return f"cut from {len(whole.input_ids)} to {len(kept.input_ids)} tokens"
    return ""


def _describe(image: bytes, grid: Grid, encoder: Encoder) -> str:
    width, height = image_size(image)
    cut = f"{grid.rows} x {grid.columns} tiles and the whole" if grid.rows else "1 tile"
    tokens = grid.tiles * encoder.processor.image_seq_len
    return f"{width} x {height} {Image.open(io.BytesIO(image)).format}: {cut}, {tokens} image tokens"


def _branch(encoded: Encoded, number: int, grids: Sequence[Grid], encoder: Encoder) -> Iterator[Piece]:
    """The first branch in full; only the trained tokens of the second, which is a rejected answer."""
    if number == 0:
        yield from _pieces(encoded.input_ids, encoded.trained, grids, encoder)
    else:
        yield Piece("rejected: ")
        yield from _texts(encoded.input_ids[encoded.trained], encoded.trained[encoded.trained], encoder)


def _pieces(ids: np.ndarray, trained: np.ndarray, grids: Sequence[Grid], encoder: Encoder) -> Iterator[Piece]:
    """Slices of equal kind; the tokens of an image are one piece.

    No other token can look like the start of an image: text holds no special tokens.
    """
    position = 0
    for number, grid in enumerate(grids, start=1):
        block = encoder.image_block(grid)
        start = position + int(np.argmax(ids[position:] == block[0]))
        yield from _texts(ids[position:start], trained[position:start], encoder)
        yield Piece(f"<image {number}: {len(block)} tokens>", image=True)
        position = start + len(block)
    yield from _texts(ids[position:], trained[position:], encoder)


def _texts(ids: np.ndarray, trained: np.ndarray, encoder: Encoder) -> Iterator[Piece]:
    for flag, run in groupby(zip(trained.tolist(), ids.tolist(), strict=True), key=lambda pair: pair[0]):
        yield Piece(encoder.tokenizer.decode([token for _, token in run]), flag)
