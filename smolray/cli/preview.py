"""The data that training will use, for `smolray preview`: prepared or raw. It needs no GPU and no Ray.

In: a run. Out: PreviewData: a folder of shards, the run's encoder, and for raw data the rows that were left out.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.text import Text

from smolray import storage
from smolray.cli.preview_samples import harmless
from smolray.config import ConfigError, RunConfig
from smolray.data.answers import TEXT_SHARDS, count_answers, distinct_texts
from smolray.data.encode import Encoder, cached_encoder
from smolray.data.first_rows import FirstRows, first_rows_of
from smolray.data.prepare import shard_folder
from smolray.data.reader import ShardReader
from smolray.data.sample import ShardRow
from smolray.data.shards import MANIFEST, ShardManifest, prepared_account, read_manifest, write_shards
from smolray.model.tiny import SHAPES, build_processor
from smolray.run.account import DataAccount

RAW_ROWS = 128  # of raw data: enough to estimate the lengths, few enough to take seconds
SHOWN_FAULTS = 5


@dataclass(frozen=True)
class PreviewData:
    """Training data to look at: shards in `folder`. `raw` is what they were made of where the data is not prepared."""

    folder: str
    manifest: ShardManifest
    encoder: Encoder
    raw: FirstRows | None = None

    @property
    def account(self) -> DataAccount:
        """What became of the raw rows, as far as they were read."""
        return self.raw.account if self.raw else prepared_account(self.manifest)

    def rows(self) -> Iterator[ShardRow]:
        """The rows of the shards in order."""
        return ShardReader.open(self.folder).rows()


@contextmanager
def open_preview(config: RunConfig, count: int) -> Iterator[PreviewData]:
    """The training data of a run, `count` rows of it at least.

    Where the data is not prepared yet, the first RAW_ROWS rows are read and kept in a temporary folder.

    Raises ConfigError where data.train is not set, SourceError where it cannot be read.
    """
    if not config.data.train:
        raise ConfigError("data.train is not set: name raw data or a folder of prepared shards")

    folder = shard_folder(config, "train")
    if storage.exists(storage.join(folder, MANIFEST)):
        manifest = read_manifest(folder)
        yield PreviewData(folder, manifest, preview_encoder(config, folder, manifest))
        return

    raw = first_rows_of(config.data, max(RAW_ROWS, count))
    with tempfile.TemporaryDirectory(prefix="smolray-preview-") as temporary:
        manifest = read_manifest(write_shards(temporary, raw.rows, rows_per_file=len(raw.rows)))
        yield PreviewData(temporary, manifest, preview_encoder(config, temporary, manifest), raw)


def preview_encoder(config: RunConfig, folder: str, manifest: ShardManifest) -> Encoder:
    """The run's encoder.

    For an offline model (tiny, random-*) only its processor is built, from the texts of the shards, as training builds
    it. Nothing is stored.
    """
    if config.model.path not in SHAPES:
        return cached_encoder(config.model, config.data, config.image)
    texts = distinct_texts(count_answers(folder, f.name, i) for i, f in enumerate(manifest.files[:TEXT_SHARDS]))
    return Encoder(build_processor(config.model.path, texts), config.data, config.image)


def raw_text(raw: FirstRows) -> Text:
    """Which part of the raw data was read, and which of its rows `prepare` would leave out, with the reasons."""
    rows = f"all {raw.read:,} rows" if raw.whole else f"the first {raw.read:,} rows"
    text = Text(f"not prepared yet: these are {rows} of the raw data, in its own order\n", style="dim")
    if not raw.left_out:
        return text

    text.append(f"left out: {len(raw.left_out):,} of {raw.read:,} rows\n", style="yellow")
    for bad in raw.left_out[:SHOWN_FAULTS]:
        text.append(f"  {harmless(bad.id)}: {bad.reason}: {harmless(bad.message)}\n", style="yellow")
    if len(raw.left_out) > SHOWN_FAULTS:
        text.append(f"  and {len(raw.left_out) - SHOWN_FAULTS:,} more\n", style="yellow")
    return text
