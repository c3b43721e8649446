"""The processor's files in an export: the base model's own, changed only where the run's image settings differ.

In: a run's settings and its prepared images. Out: files in a folder that any version of transformers, vLLM and
llama.cpp read as they read the base model. transformers would write them anew, in a form that its other versions cannot
load.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.utils import cached_file

from smolray import storage
from smolray.config import ImageConfig, ModelConfig, RunConfig
from smolray.data.processor import load_processor
from smolray.data.reader import ShardReader
from smolray.data.shards import MANIFEST
from smolray.data.tiles import Tiler, image_size
from smolray.data.tokenizer import FILE as TOKENIZER
from smolray.data.tokenizer import differences
from smolray.pretrained import resolve

COPIED = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
    "video_preprocessor_config.json",
)
IMAGES, PROCESSOR = "preprocessor_config.json", "processor_config.json"
SAMPLED_SHARDS, SAMPLED_ROW_GROUPS = 16, 8  # of each shard: its images tell the size that most images have


@dataclass(frozen=True)
class StockImages:
    """What the stock processor is told about images, and how often it then does as training did.

    Attributes:
        longest_edge: to which the stock processor scales every image, in pixels.
        splitting: whether it cuts images into tiles.
        images: training images that were looked at.
        same: those of them of which it makes the tiles that training saw.
        validation_images, validation_same: the same of the validation images; 0 without any.
    """

    longest_edge: int
    splitting: bool
    images: int
    same: int
    validation_images: int = 0
    validation_same: int = 0

    @property
    def always_same(self) -> bool:
        """Whether it makes the tiles of training of every image that was looked at."""
        return (self.same, self.validation_same) == (self.images, self.validation_images)

    @property
    def config(self) -> ImageConfig:
        """The image settings under which smolray cuts images as the stock processor then does."""
        return ImageConfig(longest_edge=self.longest_edge, upscale=True, max_tiles=None if self.splitting else 1)


def stock_images(config: RunConfig) -> StockImages:
    """The stock settings with which most training images become the tiles that training saw.

    Training scales an image by its own size (`image.upscale`, `image.max_tiles`); the stock processor scales all of
    them to one longest edge. So the edge is the one that training used most often.
    """
    tiler = Tiler(load_processor(config.model).image_processor, config.image)
    edges, validation = (
        Counter(tiler.target(*size) for size in _sampled_sizes(folder)) if folder else Counter()
        for folder in (config.data.train_folder, validation_shards(config))
    )
    edge = max(edges, key=lambda e: (edges[e], e), default=tiler.longest_edge)
    if not edges and config.image.max_tiles == 1:
        edge = min(edge, tiler.side)
    return StockImages(
        edge,
        tiler.splits and config.image.max_tiles != 1,
        edges.total(),
        edges[edge],
        validation.total(),
        validation[edge],
    )


def validation_shards(config: RunConfig) -> str:
    """The run's prepared validation data; empty where it has none, or where they are gone."""
    folder = config.data.validation
    return folder if folder and storage.exists(storage.join(folder, MANIFEST)) else ""


def write_processor(config: RunConfig, stock: StockImages, folder: Path) -> None:
    """Write the files of the base model's tokenizer, chat template, generation and processor to `folder`.

    Files of these names that are there already and that the base model lacks are kept.
    """
    for name in COPIED:
        if source := _base_file(config.model, name):
            shutil.copyfile(source, folder / name)

    for name in (IMAGES, PROCESSOR):
        if not (source := _base_file(config.model, name)):
            continue
        text = source.read_text(encoding="utf-8")
        record = json.loads(text)
        images = record if name == IMAGES else record.get("image_processor")  # transformers 5 writes one file of both
        changed = images is not None and _change(images, stock)
        if changed:
            text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_bytes(text.encode("utf-8") if changed else source.read_bytes())


def image_note(config: RunConfig, stock: StockImages) -> str:
    """What a stock call does to images, and what it does otherwise than training did."""
    if stock.always_same:
        return (
            "The processor in this folder does it as training did: it scales the longest edge to "
            f"{stock.longest_edge} pixels."
        )

    edge, counted = stock.longest_edge, f"{stock.same / stock.images:.0%} of {stock.images} training images"
    if stock.validation_images:
        share = stock.validation_same / stock.validation_images
        counted += f" and {share:.0%} of {stock.validation_images} validation images"
    notes = [
        f"The processor in this folder scales every image to `size.longest_edge` = {edge}. For {counted} it makes the "
        "same tiles as training did. Training scaled the others to another size. "
        "smolray scales no image above this edge where it loads this folder; set `image.longest_edge` to train on "
        "with larger images."
    ]
    if not config.image.upscale:
        notes.append(
            "Training did not enlarge small images: "
            "pass `size={'longest_edge': N}` with N = the next multiple of the tile's side above the image's "
            "longer edge. "
            f"A run with `image.upscale=true image.longest_edge={edge}` trains as a stock call does."
        )
    if config.image.max_tiles not in (None, 1):
        notes.append(
            f"Training used at most {config.image.max_tiles} tiles an image; the stock processor has no such limit: "
            "pass a smaller N where an image has more."
        )
    return " ".join(notes)


def token_note(folder: Path) -> str:
    """How to load the tokenizer of `folder` so that texts become the tokens that the model was trained on."""
    described = json.loads((folder / TOKENIZER).read_text(encoding="utf-8"))
    loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    note = f"`{TOKENIZER}` and the files beside it are the base model's own."
    if not (wrong := differences(described, json.loads(loaded.backend_tokenizer.to_str()))):
        return note
    return (
        f"{note} transformers 5 does not load them as they are through AutoTokenizer or AutoProcessor "
        f"({', '.join(wrong)} differ): digits after blanks become other tokens than in training. "
        "`PreTrainedTokenizerFast.from_pretrained(folder)` gives the right ones: "
        "set `processor.tokenizer` to it. transformers 4.57 loads them as they are."
    )


def _change(images: dict[str, Any], stock: StockImages) -> bool:
    """Set the image settings in a record of the base model; False where they are so already."""
    wanted = {"size": {"longest_edge": stock.longest_edge}, "do_image_splitting": stock.splitting}
    if wanted == {name: images.get(name) for name in wanted}:
        return False
    images.update(wanted)
    return True


def _base_file(model: ModelConfig, name: str) -> Path | None:
    """A file of the base model: in its folder, or from the hub or its cache."""
    found = cached_file(
        resolve(model.path), name, revision=model.revision or "main", _raise_exceptions_for_missing_entries=False
    )
    return Path(found) if found else None


def _sampled_sizes(folder: str) -> Iterator[tuple[int, int]]:
    """(width, height) of images from all over the prepared data."""
    reader = ShardReader.open(folder)
    for shard in _spread(len(reader.files), SAMPLED_SHARDS):
        for row_group in _spread(reader.row_groups(shard), SAMPLED_ROW_GROUPS):
            for row in reader.row_group(shard, row_group):
                yield from map(image_size, row.images)


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, evenly spread."""
    return sorted({i * count // most for i in range(most)}) if count else []
