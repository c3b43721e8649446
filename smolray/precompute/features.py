"""Vision features: the output of a model's frozen prefix, stored as a sidecar and read in place of the images.

In: rows of shards and a model. Out: for each row group a table of FEATURES_SCHEMA. It has, for each image, its hash,
its grid and the bits of its features: of the connector where that is frozen too, else of the vision tower. An image in
several rows is computed for each.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from smolray import storage
from smolray.config import RunConfig
from smolray.data.encode import cached_encoder
from smolray.data.image_features import FEATURES_SCHEMA, features_table
from smolray.data.sample import ShardRow
from smolray.data.shards import decode_rows, read_manifest
from smolray.data.sidecar import Sidecar, identity_of, write_table
from smolray.data.tiles import Tiler, image_size
from smolray.model.forward import TILES_AT_ONCE, tile_features, tower_features
from smolray.model.load import load_model
from smolray.model.parts import drop_submodules, frozen_prefix, weights_digest
from smolray.pretrained import DTYPES, model_config

Item = TypeVar("Item")


def features_sidecar(folder: str, config: RunConfig) -> Sidecar:
    """The sidecar of the shards in `folder` for the run's frozen prefix, processor and dtype. It may not exist yet."""
    front, encoder = frozen_prefix(config), cached_encoder(config.model, config.data, config.image)
    tokens, hidden = feature_shape(config)
    about = {"part": front[-1], "tokens": tokens, "hidden": hidden, "dtype": config.model.dtype}
    identity = identity_of(
        weights_digest(config.model, front),
        about,
        read_manifest(folder).fingerprint,
        encoder.processor.image_processor.to_dict(),
        encoder.tiler.config.model_dump(mode="json"),
    )
    return Sidecar(folder, "features", identity, about)


def feature_shape(config: RunConfig) -> tuple[int, int]:
    """The shape (tokens, hidden) of one tile's features.

    They are the connector's output, or the tower's where the connector is trained.
    """
    shape = model_config(config.model)
    patches = (shape.vision_config.image_size // shape.vision_config.patch_size) ** 2
    if "connector" in frozen_prefix(config):
        return patches // shape.scale_factor**2, shape.text_config.hidden_size
    return patches, shape.vision_config.hidden_size


def features_bytes(index: pa.Table, config: RunConfig, shards: int) -> np.ndarray:
    """Bytes of the features of each shard, counted from the index: (shards,) int64."""
    tokens, hidden = feature_shape(config)
    rows = index.group_by(["shard", "row_group", "row"]).aggregate([("tiles", "max")])
    tiles = np.bincount(rows["shard"].to_numpy(), weights=rows["tiles_max"].to_numpy(), minlength=shards).astype(
        np.int64
    )
    return tiles * tokens * hidden * DTYPES[config.model.dtype].itemsize


class FeatureWriter:
    """Holds the frozen prefix on one device and writes the tables of shards.

    `threads`: images decoded at a time while the device computes.
    """

    def __init__(self, sidecar: Sidecar, config: RunConfig, device: torch.device, threads: int = 1):
        # the front is never quantised
        plain = config.model.replace({"load_in_4bit": False, "load_in_8bit": False})
        self.model = drop_submodules(load_model(plain), ["text"]).to(device).eval()
        self.tiler = cached_encoder(config.model, config.data, config.image).tiler
        self.sidecar, self.device, self.threads = sidecar, device, threads

    def write(self, name: str) -> None:
        """The table of one shard file, and its note."""
        about = self.sidecar.about
        schema = FEATURES_SCHEMA.with_metadata({k: str(about[k]) for k in ("tokens", "hidden", "dtype")})
        write_table(self.sidecar, name, schema, self._tables(name, schema))

    def _tables(self, name: str, schema: pa.Schema) -> Iterator[pa.Table]:
        with ThreadPoolExecutor(self.threads) as pool:
            decoding = (
                (
                    row_groups,
                    [
                        pool.submit(self.tiler.tiles, image)
                        for rows in row_groups
                        for row in rows
                        for image in row.images
                    ],
                )
                for row_groups in _gathered(_row_groups(self.sidecar.folder, name), self.tiler)
            )

            # the next images are decoded while the device is busy with these
            for row_groups, images in _one_ahead(decoding):
                tiles = [image.result() for image in images]
                bits = self._bits(np.concatenate(tiles)) if tiles else np.zeros(0)
                found = iter(np.split(bits, np.cumsum([len(t) for t in tiles])[:-1]))
                for rows in row_groups:
                    yield features_table(rows, [[next(found) for _ in row.images] for row in rows], self.tiler, schema)

    @torch.inference_mode()
    def _bits(self, tiles: np.ndarray) -> np.ndarray:
        """(T, 3, side, side) uint8 -> (T, tokens, hidden), 16-bit types as uint16."""
        run = tile_features if self.sidecar.about["part"] == "connector" else tower_features
        parts = [run(self.model, part.to(self.device)).cpu() for part in torch.from_numpy(tiles).split(TILES_AT_ONCE)]
        features = torch.cat(parts).contiguous()
        return (features if features.dtype == torch.float32 else features.view(torch.uint16)).numpy()


def _row_groups(folder: str, name: str) -> Iterator[list[ShardRow]]:
    fs, path = storage.filesystem(storage.join(folder, name))
    with pq.ParquetFile(path, filesystem=fs) as file:
        for row_group in range(file.num_row_groups):
            yield decode_rows(file.read_row_group(row_group))


def _gathered(row_groups: Iterable[list[ShardRow]], tiler: Tiler) -> Iterator[list[list[ShardRow]]]:
    """Neighbouring row groups that together have enough tiles for a full batch."""
    gathered: list[list[ShardRow]] = []
    tiles = 0
    for rows in row_groups:
        gathered.append(rows)
        tiles += sum(tiler.grid(*image_size(image)).tiles for row in rows for image in row.images)
        if tiles >= TILES_AT_ONCE:
            yield gathered
            gathered, tiles = [], 0
    if gathered:
        yield gathered


def _one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield each item after the next one has been drawn."""
    held: list[Item] = []
    for item in items:
        yield from held
        held = [item]
    yield from held
