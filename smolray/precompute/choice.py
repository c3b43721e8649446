"""What `model.vision_features = auto` means for a run: whether its frozen vision features are computed in every pass,
or once, before the first step.

In: a RunConfig and the folders of its shards, whose indexes are there. Out: the RunConfig with `compute` or
`precompute`.
"""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

from smolray import storage
from smolray.config import RunConfig
from smolray.data.ray_jobs import load_index
from smolray.data.reader import Folders
from smolray.data.shards import read_manifest
from smolray.data.sidecar import is_whole
from smolray.model.parts import frozen_prefix
from smolray.precompute.features import features_bytes, features_sidecar
from smolray.run.progress import size

WORTH = 1.5  # times the work saved over the work done: below it the features do not repay their writing
DISK_SHARE = 0.5  # of what is free on a local disk
OTHER_FEATURES = ("model.", "image.", "lora.groups")  # settings of a search whose trials need features of their own

Say = Callable[[str], None]


def with_vision_features(config: RunConfig, folders: Folders, say: Say = print) -> RunConfig:
    """The config with `auto` decided for prepared data: the features are precomputed where they stand already, or where
    the passes ahead would compute WORTH times as many and a local disk has room. A bucket's room is not known, so
    nothing is written there unasked.
    """
    if config.model.vision_features != "auto":
        return config
    if not _possible(config):
        return config.replace({"model.vision_features": "compute"})

    train, validation = _bytes(folders.train, config), _bytes(folders.validation, config)
    conversations = load_index(folders.train, config).num_rows
    passes, evaluations = _passes(config, conversations), _evaluations(config, conversations)
    in_passes = passes * train + evaluations * _evaluated_share(config, folders) * validation
    pays = in_passes >= WORTH * (train + validation) > 0

    if pays and _has_room(folders.train, train + validation):
        say(
            f"vision features: frozen, and needed {in_passes / (train + validation):.3g} times: computed once, "
            f"{size(train + validation)} (model.vision_features=compute: in every pass)"
        )
    elif not _stand(folders, config):
        return config.replace({"model.vision_features": "compute"})
    return config.replace({"model.vision_features": "precompute"})


def _possible(config: RunConfig) -> bool:
    """Whether anything in front of what is trained stays as it is, and the engine reads features."""
    return bool(frozen_prefix(config)) and config.engine.name != "trl"


def _bytes(folder: str, config: RunConfig) -> int:
    """Bytes of the features of a shard folder, in proportion to its tiles; 0 without a folder."""
    if not folder:
        return 0
    return int(features_bytes(load_index(folder, config), config, len(read_manifest(folder).files)).sum())


def _passes(config: RunConfig, conversations: int) -> float:
    """Passes over the training data, those of all trials of a search that can share features."""
    train, search = config.train, config.search
    passes = float(train.num_train_epochs)
    if train.max_steps > 0:
        passes = train.max_steps * config.global_batch * train.per_device_train_batch_size / max(conversations, 1)

    if search is not None and not any(key.startswith(OTHER_FEATURES) for key in search.space):
        passes *= search.num_samples
    return passes


def _evaluations(config: RunConfig, conversations: int) -> int:
    """How often the validation data are looked at: at each `eval_epochs`, and at the end."""
    every = config.evaluate.eval_epochs
    return max(1, math.ceil(_passes(config, conversations) / every)) if every else 1


def _evaluated_share(config: RunConfig, folders: Folders) -> float:
    """The share of the validation data that an evaluation looks at."""
    if not folders.validation or config.evaluate.max_samples is None:
        return 1.0
    return min(1.0, config.evaluate.max_samples / max(load_index(folders.validation, config).num_rows, 1))


def _has_room(folder: str, needed: int) -> bool:
    if not storage.is_local(folder):
        return False
    return needed <= DISK_SHARE * shutil.disk_usage(Path(storage.absolute(folder))).free


def _stand(folders: Folders, config: RunConfig) -> bool:
    """Whether the training shards have whole features already."""
    if not any(name.startswith("features-") for name in storage.list_dirs(folders.train)):
        return False  # the weights need not be hashed
    return is_whole(features_sidecar(folders.train, config), read_manifest(folders.train))
