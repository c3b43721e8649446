"""Before training: raw data to shards, index and sidecars, and the offline models that need them."""

import tempfile
from dataclasses import replace
from pathlib import Path

from smolray import storage
from smolray.config import ConfigError, RunConfig
from smolray.data.answers import TEXT_SHARDS, count_answers, distinct_texts
from smolray.data.prepare import prepare_run, shard_folder
from smolray.data.ray_jobs import ensure_index, map_shards
from smolray.data.reader import Folders
from smolray.data.shards import read_manifest
from smolray.model.tiny import SHAPES, build_model
from smolray.precompute.jobs import ensure_sidecars


def prepare_data(config: RunConfig) -> tuple[RunConfig, Folders]:
    """Shards, the offline model where one is asked for, and the indexes; each is made once and found again."""
    if not config.data.train:
        raise ConfigError("data.train is not set; expected a path, URI or hub data set id with training data")
    prepare_run(config)
    folders = Folders(
        shard_folder(config, "train"), shard_folder(config, "validation") if config.data.validation else ""
    )
    # From here on the run names its shards: a source that has moved or changed does not touch a run that has begun.
    config = config.replace({"data.train": folders.train, "data.validation": folders.validation})
    config = with_offline_model(config, folders.train)
    for folder in (folders.train, folders.validation):
        if folder:
            ensure_index(folder, config)
    # What is read with the shards, made once as well; evaluation asks no reference model.
    folders = replace(folders, sidecars=ensure_sidecars(folders.train, config))
    if folders.validation:
        folders = replace(folders, validation_sidecars=ensure_sidecars(folders.validation, config, reference=False))
    return config, folders


def with_offline_model(config: RunConfig, train_folder: str) -> RunConfig:
    """For model.path = tiny or random-*: write that model once, its tokenizer trained on the data set's text, and point
    the run at it.
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
            # the file that is looked for comes last
            for file in sorted(Path(local).iterdir(), key=lambda f: f.name == "config.json"):
                storage.write_bytes(storage.join(target, file.name), file.read_bytes())
    return config.replace({"model.path": target})
