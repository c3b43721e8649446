"""What training will see, before it starts: decoded samples with their trained tokens, tokens of the images, lengths of
the data.

In: a run whose shards are prepared. Out: PreviewItems and a LengthSummary, and how both are printed. Takes no GPU and
no Ray.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pyarrow as pa
from PIL import Image
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from smolray import storage
from smolray.config import ConfigError, DataConfig, RunConfig
from smolray.data.answers import TEXT_SHARDS, count_answers, distinct_texts
from smolray.data.encode import Encoded, EncodeError, Encoder
from smolray.data.index import index_shard, index_uri, read_index
from smolray.data.pack import common_prefix, packed_length
from smolray.data.plan import PlanLimits, build_epoch
from smolray.data.prepare import shard_folder
from smolray.data.processor import load_processor
from smolray.data.reader import ShardReader
from smolray.data.sample import Conversation, ShardRow
from smolray.data.shards import Manifest, read_manifest
from smolray.data.tiles import Grid, image_size
from smolray.model.tiny import SHAPES, build_processor

BINS, BAR = 12, 40


@dataclass(frozen=True)
class Piece:
    """A run of the sequence: its text, whether it counts in the loss, and whether it stands for a picture."""

    text: str
    trained: bool = False
    image: bool = False


@dataclass(frozen=True)
class PreviewItem:
    """One conversation as the model meets it. `note` says why it is left out or cut, where it is."""

    id: str
    pieces: tuple[Piece, ...]
    tokens: int
    image_tokens: int
    label_tokens: int
    images: tuple[str, ...]  # size, format, tiles and tokens of each
    note: str = ""


@dataclass(frozen=True)
class LengthSummary:
    """Token counts from the index: of all shards, or of the first where no index is made yet (`complete` is False)."""

    tokens: np.ndarray  # of each conversation that is trained
    label_tokens: int
    tiles: int
    rows: int
    left_out: int
    micro_batches: int
    padding: float  # share of the tokens of micro-batches that is padding
    complete: bool


def preview(config: RunConfig, count: int) -> Iterator[PreviewItem]:
    """The first conversation of each of the first `count` rows of the training shards, whose rows are shuffled.

    Raises ConfigError, SourceError, and ShardError where the shards are not there (it names `smolray prepare`).
    """
    folder, manifest = _shards(config)
    encoder = preview_encoder(config, folder, manifest)
    reader = ShardReader(folder, tuple(f.name for f in manifest.files))
    for number, row in enumerate(_rows(reader)):
        if number == count:
            return
        yield preview_item(row, row.conversations[0], encoder)


def preview_encoder(config: RunConfig, folder: str, manifest: Manifest) -> Encoder:
    """The run's encoder; of an offline model (tiny, random-*) only the processor is made, as training will make it, and
    nothing is kept.
    """
    if config.model.path not in SHAPES:
        return Encoder(load_processor(config.model), config.data, config.image)
    texts = distinct_texts(count_answers(folder, f.name, i) for i, f in enumerate(manifest.files[:TEXT_SHARDS]))
    return Encoder(build_processor(config.model.path, texts), config.data, config.image)


def preview_item(row: ShardRow, conversation: Conversation, encoder: Encoder) -> PreviewItem:
    """One conversation of a row, encoded by the run's settings; shown in whole where these leave it out."""
    grids = [encoder.tiler.grid(*image_size(image)) for image in row.images]
    images = tuple(_describe(image, grid, encoder) for image, grid in zip(row.images, grids, strict=True))
    boundless = Encoder(encoder.processor, DataConfig(max_length=10**9), encoder.tiler.config)
    encoded = boundless.branches(conversation, grids)
    assert encoded is not None  # it has no limit
    try:
        kept = encoder.branches(conversation, grids)
        note = _note(encoded[0], kept[0] if kept else None, encoder.max_length)
        encoded = kept or encoded
    except EncodeError as error:  # data.overlong = error: training would stop here
        note = str(error)
    pieces = [piece for number, branch in enumerate(encoded) for piece in _branch(branch, number, grids, encoder)]
    tokens, prefix = [len(e.input_ids) for e in encoded], common_prefix(encoded)
    image_tokens = int((encoded[0].input_ids == encoder.image_token_id).sum())
    labels = sum(e.label_tokens for e in encoded)
    return PreviewItem(
        conversation.id, tuple(pieces), packed_length(tokens, prefix), image_tokens, labels, images, note
    )


def lengths(config: RunConfig) -> LengthSummary:
    """Lengths of the training data by its index; without one, of the first shard alone, which is a fair sample of
    shuffled rows.

    Raises what `preview` raises, and PlanError where no conversation is left to train on.
    """
    folder, manifest = _shards(config)
    encoder = preview_encoder(config, folder, manifest)
    uri = index_uri(folder, encoder)
    complete = storage.exists(uri) or len(manifest.files) == 1
    index = read_index(uri) if storage.exists(uri) else index_shard(folder, manifest.files[0].name, 0, encoder)
    return summarize(index, config, complete)


def summarize(index: pa.Table, config: RunConfig, complete: bool = True) -> LengthSummary:
    """What an index says of lengths, and what the plan of an epoch makes of them."""
    plan = build_epoch(index, PlanLimits.of(config), config.seed, 0)
    column = {name: index[name].to_numpy() for name in index.column_names}
    kept = (column["tokens"] > 0) & (column["label_tokens"] > 0)
    place = np.stack([column[name] for name in ("shard", "row_group", "row")])
    first = np.ones(len(index), bool)
    first[1:] = (place[:, 1:] != place[:, :-1]).any(0)
    used = int(column["tokens"][plan.lines].sum())
    # shared by its group
    used -= int((column["prefix"][plan.lines[plan.group_start[:-1]]] * (np.diff(plan.group_start) - 1)).sum())
    return LengthSummary(
        tokens=column["tokens"][kept],
        label_tokens=int(column["label_tokens"][kept].sum()),
        tiles=int(column["tiles"][first].sum()),
        rows=int(first.sum()),
        left_out=int((~kept).sum()),
        micro_batches=len(plan),
        padding=1 - used / int(plan.tokens.sum()),
        complete=complete,
    )


def item_text(item: PreviewItem) -> Text:
    """The sample in print: trained tokens in «green», which is seen in a file as well; pictures as one word."""
    text = Text()
    text.append(_harmless(item.id), style="bold")
    text.append(f"  {item.tokens} tokens, {item.image_tokens} of images, {item.label_tokens} trained\n", style="dim")
    for image in item.images:
        text.append(f"  image {image}\n", style="dim")
    if item.note:
        text.append(f"  {_harmless(item.note)}\n", style="yellow")
    for piece in item.pieces:
        if piece.trained:
            body = piece.text.rstrip("\n")
            text.append(f"«{_harmless(body)}{'↵' * (len(piece.text) - len(body))}»\n", style="bold green")
        else:
            text.append(_harmless(piece.text), style="cyan" if piece.image else "")
    return text


def lengths_table(summary: LengthSummary) -> Table:
    """A histogram of the lengths, and the sums under it."""
    tokens = summary.tokens
    counts, edges = np.histogram(
        tokens, bins=np.unique(np.linspace(tokens.min(), tokens.max() + 1, BINS + 1).round().astype(int))
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("tokens", justify="right")
    table.add_column("conversations", justify="right")
    table.add_column("")
    for low, high, number in zip(edges, edges[1:], counts, strict=False):
        table.add_row(
            f"{low} to {high - 1}" if high - 1 > low else f"{low}",
            f"{number:,}",
            "█" * -(-BAR * number // counts.max()),
        )
    percentiles = ", ".join(
        f"{name} {np.percentile(tokens, p):.0f}" for name, p in (("median", 50), ("95 %", 95), ("longest", 100))
    )
    table.add_row("", f"{len(tokens):,}", percentiles, style="dim")
    about = f"{summary.label_tokens / tokens.sum():.1%} of the tokens trained; {summary.tiles / summary.rows:.1f} tiles a row; "
    about += f"{summary.micro_batches:,} micro-batches an epoch, {summary.padding:.1%} of them padding"
    table.add_row("", "", about, style="dim")
    if summary.left_out:
        table.add_row(
            "",
            f"{summary.left_out:,}",
            "left out: longer than data.max_length, or no token to train on",
            style="yellow",
        )
    if not summary.complete:
        table.add_row("", "", escape("of the first shard alone: no index is made yet"), style="dim")
    return table


def _shards(config: RunConfig) -> tuple[str, Manifest]:
    if not config.data.train:
        raise ConfigError("data.train is not set: name raw data or a folder of prepared shards")
    folder = shard_folder(config, "train")
    return folder, read_manifest(folder)


def _rows(reader: ShardReader) -> Iterator[ShardRow]:
    for shard in range(len(reader.files)):
        for group in range(reader.row_groups(shard)):
            yield from reader.row_group(shard, group)


def _harmless(text: str) -> str:
    """Control characters spelt out: text of a data set must not steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def _note(whole: Encoded, kept: Encoded | None, max_length: int) -> str:
    if kept is None:
        return f"left out: {len(whole.input_ids)} tokens, data.max_length = {max_length}"
    if not kept.label_tokens:
        return "left out: no token to train on"
    return (
        f"cut from {len(whole.input_ids)} to {len(kept.input_ids)} tokens"
        if len(kept.input_ids) < len(whole.input_ids)
        else ""
    )


def _describe(image: bytes, grid: Grid, encoder: Encoder) -> str:
    width, height = image_size(image)
    cut = f"{grid.rows} x {grid.columns} tiles and the whole" if grid.rows else "1 tile"
    tokens = grid.tiles * encoder.processor.image_seq_len
    return f"{width} x {height} {Image.open(io.BytesIO(image)).format}: {cut}, {tokens} image tokens"


def _branch(encoded: Encoded, number: int, grids: Sequence[Grid], encoder: Encoder) -> Iterator[Piece]:
    """The first branch in full; of the second (a rejected ending) what it would train."""
    if number == 0:
        yield from _pieces(encoded.input_ids, encoded.trained, grids, encoder)
    else:
        yield Piece("rejected: ")
        yield from _texts(encoded.input_ids[encoded.trained], encoded.trained[encoded.trained], encoder)


def _pieces(ids: np.ndarray, trained: np.ndarray, grids: Sequence[Grid], encoder: Encoder) -> Iterator[Piece]:
    """Runs of equal kind; the block of tokens of a picture is one piece.

    No other token can begin like a block: text holds no special ones.
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
