"""Before training: raw data become shards, index and sidecars; offline models are built from them.

In: a RunConfig. Out: the config that names the shards, the Folders that the workers read, and an account of the
data.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

from smolray import storage
from smolray.config import ConfigError, DataConfig, RunConfig
from smolray.data.answers import TEXT_SHARDS, count_answers, distinct_texts
from smolray.data.index import add_lengths
from smolray.data.plan import PlanError, check_kind
from smolray.data.prepare import prepare_run, shard_folder, with_leak
from smolray.data.ray_jobs import load_index, map_shards, with_max_length
from smolray.data.reader import Folders
from smolray.data.repeats import kept_of_sources
from smolray.data.shards import prepared_account, read_manifest
from smolray.data.sources import repeats_of
from smolray.model.tiny import SHAPES, build_model
from smolray.precompute.choice import with_vision_features
from smolray.precompute.jobs import ensure_sidecars
from smolray.run.account import DataAccount


def prepare_data(config: RunConfig) -> tuple[RunConfig, Folders, dict[str, DataAccount]]:
    """Make the shards, the offline model where the run names one, the indexes and the sidecars.

    Each is made once, and found by later runs. The accounts are by "train" and "validation".

    Raises ConfigError where data.train is not set, PlanError where too many conversations are left out
    or too many rows of an image data set have no image, or the data are not what the method learns from.
    """
    if not config.data.train:
        raise ConfigError("data.train is not set; expected a path, URI or hub data set id with training data")
    prepare_run(config)
    validation = shard_folder(config, "validation") if config.data.evaluates else ""

    folders, named = Folders(shard_folder(config, "train"), validation), config.data
    # From here on the run names its shards: a source that moves or changes does not affect a run that has begun.
    config = config.replace(
        {
            "data.train": folders.train,
            "data.validation": folders.validation,
            "data.validation_fraction": 0.0,
            "data.max_samples": None,
        }
    )

    config = with_offline_model(config, folders.train)
    parts = {"train": folders.train} | ({"validation": folders.validation} if folders.validation else {})
    config = with_max_length(config, list(parts.values()))
    config = with_repeats(config, named)
    accounts = {part: data_account(folder, config) for part, folder in parts.items()}
    if folders.validation:
        accounts["validation"] = with_leak(accounts["validation"], folders.train, validation)
    for part, account in accounts.items():
        require_images(part, account, config)
        require_kept(part, account, config)

    check_kind(load_index(folders.train, config), config.method)

    config = with_vision_features(config, folders)
    # Evaluation needs no reference model.
    folders = replace(folders, sidecars=ensure_sidecars(folders.train, config))
    if folders.validation:
        folders = replace(folders, validation_sidecars=ensure_sidecars(folders.validation, config, reference=False))
    return config, folders, accounts


def with_repeats(config: RunConfig, data: DataConfig) -> RunConfig:
    """The prepared run with data.repeats as its sources say. `data`: its settings before they were prepared."""
    folder = config.data.train_folder
    repeats = repeats_of(data, load_index(folder, config))
    sources = len(prepared_account(read_manifest(folder)).paths) or 1
    if len(repeats) not in (0, sources):
        raise ConfigError(
            f"data.repeats = {list(repeats)}: {folder} is of {sources} sources; expected one number for each"
        )
    return config.replace({"data.repeats": repeats})


def data_account(folder: str, config: RunConfig) -> DataAccount:
    """What became of the data in a shard folder, from their raw rows to what this run uses. The index must be there."""
    index, max_length = load_index(folder, config), config.data.max_length
    assert max_length != "auto"  # with_max_length has made it a number
    account = add_lengths(prepared_account(read_manifest(folder)), index, max_length)
    if not account.sources or folder != config.data.train:
        return account

    repeats = config.data.repeats or [1.0] * len(account.sources)
    numbers = zip(account.sources, kept_of_sources(index, len(repeats)), repeats, strict=True)
    return replace(account, sources=tuple(replace(one, epoch=round(n * times)) for one, n, times in numbers))


def require_images(part: str, account: DataAccount, config: RunConfig) -> None:
    """Raise PlanError where an image data set has too many rows without an image.

    data.max_bad_fraction is the limit. A model that is trained without its images looks like success.
    """
    rows, data = account.rows, config.data
    if rows is None or data.text_only_ok or not (rows.with_images or rows.without_image):
        return
    blind = rows.text_only if rows.with_images else rows.without_image
    if blind <= data.max_bad_fraction * rows.rows:
        return
    what = f" ({rows.without_image:,} of them with an empty image column)" if rows.without_image else ""
    raise PlanError(
        f"{blind:,} of {rows.rows:,} rows of {account.source}, the {part} data, have no image{what}: more than "
        f"data.max_bad_fraction = {data.max_bad_fraction} allows in an image data set. Mend the source, name the "
        "column of the images with data.columns.image, or set data.text_only_ok=true where rows without images are "
        "meant"
    )


def require_kept(part: str, account: DataAccount, config: RunConfig) -> None:
    """Raise PlanError where more conversations are left out than data.max_left_out_fraction allows."""
    allowed = config.data.max_left_out_fraction
    if account.left_out <= allowed * account.conversations:
        return
    told = "\n".join(f"  {line}" for line in account.lines(part))
    raise PlanError(
        f"{account.left_out:,} of {account.conversations:,} {part} conversations would be left out, more than "
        f"data.max_left_out_fraction = {allowed} allows\n{told}\n"
        "Where that is meant, raise data.max_left_out_fraction"
    )


def with_offline_model(config: RunConfig, train_folder: str) -> RunConfig:
    """For model.path = tiny or random-*: the run with the path of that model.

    It is written once; its tokenizer is trained on the text of the data set.
    """
    shape = config.model.path
    if shape not in SHAPES:
        return config

    manifest = read_manifest(train_folder)
    target = storage.join(config.storage, "models", f"{shape}-{manifest.fingerprint}-{config.seed}")
    if not storage.exists(storage.join(target, "config.json")):
        few = replace(manifest, files=manifest.files[:TEXT_SHARDS])
        texts = distinct_texts(map_shards(train_folder, few, count_answers, config.data.num_cpus_per_task))
        with tempfile.TemporaryDirectory() as local:
            build_model(shape, texts, local, config.seed)
            # config.json comes last: it says that the model is whole
            for file in sorted(Path(local).iterdir(), key=lambda f: f.name == "config.json"):
                storage.write_bytes(storage.join(target, file.name), file.read_bytes())
    return config.replace({"model.path": target})
