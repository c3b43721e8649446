"""Before training: raw data become shards, index and sidecars; offline models are built from them.

In: a RunConfig. Out: the config that names the shards, and the Folders that the workers read.
"""

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
    """Make the shards, the offline model where the run names one, the indexes and the sidecars.

    Each is made once, and found by later runs. Raises ConfigError where data.train is not set.
    """
    if not config.data.train:
        raise ConfigError("data.train is not set; expected a path, URI or hub data set id with training data")
    prepare_run(config)
    validation = shard_folder(config, "validation") if config.data.validation else ""

    folders = Folders(shard_folder(config, "train"), validation)
    # From here on the run names its shards: a source that moves or changes does not affect a run that has begun.
    config = config.replace({"data.train": folders.train, "data.validation": folders.validation})

    config = with_offline_model(config, folders.train)
    for folder in (folders.train, folders.validation):
        if folder:
            ensure_index(folder, config)

    # Evaluation needs no reference model.
    folders = replace(folders, sidecars=ensure_sidecars(folders.train, config))
    if folders.validation:
        folders = replace(folders, validation_sidecars=ensure_sidecars(folders.validation, config, reference=False))
    return config, folders


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
