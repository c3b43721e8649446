"""Features of images as rows of a sidecar: their schema, encoding and decoding."""

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from smolray.data.collate import ImageFeatures
from smolray.data.sample import ShardRow
from smolray.data.tiles import Grid, Tiler, image_size

FEATURES_SCHEMA = pa.schema(
    [
        ("key", pa.string()),  # of the shard's row
        ("images", pa.list_(pa.binary())),  # a hash of each image of the row
        ("rows", pa.list_(pa.int32())),  # its grid
        ("columns", pa.list_(pa.int32())),
        ("features", pa.list_(pa.large_binary())),  # (tiles, tokens, hidden) in the compute dtype
    ]
)


def features_table(
    rows: Sequence[ShardRow], bits: Sequence[Sequence[np.ndarray]], tiler: Tiler, schema: pa.Schema
) -> pa.Table:
    """The table of one row group: `bits` has, for each image of each row, (tiles, tokens, hidden)."""
    grids = [[tiler.grid(*image_size(image)) for image in row.images] for row in rows]
    columns = [
        [row.key for row in rows],
        [[hashlib.blake2b(image, digest_size=16).digest() for image in row.images] for row in rows],
        [[grid.rows for grid in of_row] for of_row in grids],
        [[grid.columns for grid in of_row] for of_row in grids],
        [[values.tobytes() for values in of_row] for of_row in bits],
    ]
    return pa.table(
        [pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)], schema=schema
    )


def decode_features(table: pa.Table) -> list[tuple[ImageFeatures, ...]]:
    """The features of each image of each row of a row group; the bits are views of the table's memory."""
    about = {k.decode(): v.decode() for k, v in table.schema.metadata.items()}
    kind = np.float32 if about["dtype"] == "float32" else np.uint16

    decoded = []
    for row in range(len(table)):
        of_row = zip(*(table[name][row] for name in ("images", "rows", "columns", "features")), strict=True)
        decoded.append(
            tuple(
                ImageFeatures(
                    image.as_py(),
                    Grid(rows.as_py(), columns.as_py()),
                    np.frombuffer(bits.as_buffer(), kind).reshape(-1, int(about["tokens"]), int(about["hidden"])),
                    about["dtype"],
                )
                for image, rows, columns, bits in of_row
            )
        )
    return decoded
