"""Tokens, trained tokens and tiles of every conversation, counted once for a processor.

In: shards and an Encoder. Out: a table with one row for each conversation, kept as `index-<fingerprint>.parquet` next
to the shards; pixels are not decoded. The plan of an epoch is built from this table alone.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smolray import storage
from smolray.data.encode import Encoded, Encoder
from smolray.data.fill import packed_length
from smolray.data.pack import common_prefix
from smolray.data.sample import Conversation
from smolray.data.shards import decode_rows
from smolray.data.tiles import Grid, image_size
from smolray.run.account import DataAccount

SHOWN_LENGTHS = 3
INDEX_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("row_group", pa.int32()),
        ("row", pa.int32()),  # inside the row group
        ("conversation", pa.int32()),  # inside the row
        ("tokens", pa.int32()),  # 0: left out, too long
        ("prefix", pa.int32()),  # tokens that all conversations of the row share
        ("label_tokens", pa.int32()),
        ("chosen_tokens", pa.int32()),  # those of them in the chosen answer; 0: no preference data
        ("tiles", pa.int32()),
    ]
)
# Tokens of the longest sequence before it was left out or cut. No plan needs it, so an index without it stays valid.
LENGTH = pa.field("length", pa.int32())
# The number of the conversation's source, where the data have several; 0 in an index without it.
SOURCE = pa.field("source", pa.int32())
WHOLE_SCHEMA = INDEX_SCHEMA.append(LENGTH).append(SOURCE)


def fingerprint(encoder: Encoder) -> str:
    """Identity of everything that token counts depend on."""
    parts = [
        encoder.tokenizer.backend_tokenizer.to_str(),
        encoder.processor.chat_template,
        json.dumps(encoder.processor.image_processor.to_dict(), sort_keys=True, default=str),
        str(encoder.processor.image_seq_len),
        encoder.tiler.config.model_dump_json(),
        f"{encoder.max_length} {encoder.overlong}",
        ",".join(INDEX_SCHEMA.names),
    ]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()


def index_shard(folder: str, name: str, number: int, encoder: Encoder) -> pa.Table:
    """The index rows of one shard file (see WHOLE_SCHEMA)."""
    fs, path = storage.filesystem(storage.join(folder, name))
    columns: dict[str, list[int]] = {field.name: [] for field in WHOLE_SCHEMA}
    with pq.ParquetFile(path, filesystem=fs) as file:
        for group in range(file.num_row_groups):
            for r, row in enumerate(decode_rows(file.read_row_group(group))):
                grids = [encoder.tiler.grid(*image_size(image)) for image in row.images]
                encoded = [encoder.branches(c, grids) for c in row.conversations]
                prefix = common_prefix([branch for branches in encoded for branch in branches or ()])
                for c, branches in enumerate(encoded):
                    tokens = packed_length([len(b.input_ids) for b in branches], prefix) if branches else 0
                    labels = [b.label_tokens for b in branches or ()]
                    chosen = labels[0] if len(labels) == 2 else 0
                    tiles = sum(g.tiles for g in grids)
                    length = _length(encoder, row.conversations[c], grids, branches)
                    source = row.conversations[c].source
                    index_row = (number, group, r, c, tokens, prefix, sum(labels), chosen, tiles, length, source)
                    for column, value in zip(columns.values(), index_row, strict=True):
                        column.append(value)
    return pa.table({name: np.array(values) for name, values in columns.items()}).cast(WHOLE_SCHEMA)


def _length(
    encoder: Encoder, conversation: Conversation, grids: Sequence[Grid], branches: Sequence[Encoded] | None
) -> int:
    """Tokens of the longest sequence of a conversation; encoded again only where some may be missing."""
    longest = max((len(b.input_ids) for b in branches or ()), default=0)
    whole = branches and (longest < encoder.max_length or encoder.overlong != "truncate_text")
    return longest if whole else encoder.length(conversation, grids)


def add_lengths(account: DataAccount, index: pa.Table, max_length: int) -> DataAccount:
    """The account of a data set with what its index says: conversations left out or cut, and how long those are."""
    tokens, labels = (index[name].to_numpy() for name in ("tokens", "label_tokens"))
    lengths = index["length"].to_numpy() if "length" in index.column_names else tokens
    too_long = tokens == 0
    over = lengths > max_length
    return replace(
        account,
        conversations=len(index),
        too_long=int(too_long.sum()),
        untrained=int((~too_long & (labels == 0)).sum()),
        cut=int((~too_long & over).sum()),
        longest=tuple(int(n) for n in np.sort(lengths[over])[::-1][:SHOWN_LENGTHS]),
        max_length=max_length,
    )


def longest_kept(index: pa.Table) -> int:
    """Tokens of the longest sequence that is not left out."""
    column = "length" if "length" in index.column_names else "tokens"
    lengths = index[column].to_numpy()[index["tokens"].to_numpy() > 0]
    return int(lengths.max(initial=0))


def index_uri(folder: str, encoder: Encoder) -> str:
    """Where the index of a shard folder is kept for this encoder."""
    return storage.join(folder, f"index-{fingerprint(encoder)}.parquet")


def write_index(uri: str, table: pa.Table) -> None:
    """Write the table (see INDEX_SCHEMA) whole or not at all."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    storage.write_bytes(uri, sink.getvalue().to_pybytes())


def read_index(uri: str) -> pa.Table:
    """The index table (see INDEX_SCHEMA)."""
    return pq.read_table(pa.BufferReader(storage.read_bytes(uri)))
