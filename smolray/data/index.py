"""Tokens, trained tokens and tiles of every conversation, counted once for a processor.

In: shards and an Encoder. Out: a table with one row for each conversation, kept as `index-<fingerprint>.parquet` next
to the shards; pixels are not decoded. The plan of an epoch is built from this table alone.
"""

import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smolray import storage
from smolray.data.encode import Encoder
from smolray.data.fill import packed_length
from smolray.data.pack import common_prefix
from smolray.data.shards import decode_rows
from smolray.data.tiles import image_size

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
    """The index rows of one shard file (see INDEX_SCHEMA)."""
    fs, path = storage.filesystem(storage.join(folder, name))
    columns: dict[str, list[int]] = {field.name: [] for field in INDEX_SCHEMA}
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
                    index_row = (number, group, r, c, tokens, prefix, sum(labels), chosen, sum(g.tiles for g in grids))
                    for column, value in zip(columns.values(), index_row, strict=True):
                        column.append(value)
    return pa.table({name: np.array(values) for name, values in columns.items()}).cast(INDEX_SCHEMA)


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
