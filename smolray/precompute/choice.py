"""What `model.vision_features = auto` means for a run.

Its frozen vision features are computed in every pass, or once, before the first step.

In: a RunConfig and the folders of its shards, whose indexes are there. Out: the RunConfig with `compute` or
`precompute`.
"""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

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
    """The config with `auto` decided for prepared data.

    The features are precomputed where they stand already, or where the passes ahead would compute WORTH times as many
    and a local disk has room. A bucket's room is not known, so nothing is written there unasked. `say` is told what was
    chosen wherever there was a choice.
    """
    if config.model.vision_features != "auto":
        return config
    possible = bool(frozen_prefix(config)) and config.engine.name != "trl"
    if possible and config.data.augment:
        say("vision features: frozen, but computed in every pass: data.augment changes the images in each epoch")
        possible = False
    chosen = _chosen(config, folders, say) if possible else "compute"
    return config.replace({"model.vision_features": chosen})


def _chosen(config: RunConfig, folders: Folders, say: Say) -> str:
    """`compute` or `precompute`, for a run whose features never change."""
    if _stand(folders, config):
        say("vision features: frozen, and those that stand beside the shards are read")
        return "precompute"

    train = load_index(folders.train, config)
    validation = load_index(folders.validation, config) if folders.validation else None
    once = of_train = _bytes(folders.train, train, config)
    passes = _passes(config, train.num_rows)
    needed = passes * of_train
    if validation is not None:
        of_validation = _bytes(folders.validation, validation, config)
        once += of_validation
        needed += _evaluations(config, passes) * _evaluated_share(config, validation.num_rows) * of_validation
    if not needed >= WORTH * once > 0:
        return "compute"

    frozen = f"vision features: frozen, and needed {needed / once:.3g} times"
    if lacks := _lacks_room(folders.train, once):
        say(f"{frozen}, but computed in every pass: {lacks} (model.vision_features=precompute: once)")
        return "compute"
    say(f"{frozen}: computed once, {size(once)} (model.vision_features=compute: in every pass)")
    return "precompute"


def _bytes(folder: str, index: pa.Table, config: RunConfig) -> int:
    """Bytes of the features of a shard folder, in proportion to its tiles."""
    return int(features_bytes(index, config, len(read_manifest(folder).files)).sum())


def _passes(config: RunConfig, conversations: int) -> float:
    """Passes over the training data, those of all trials of a search that can share features."""
    train, search = config.train, config.search
    passes = float(train.num_train_epochs)
    if train.max_steps > 0:
        passes = train.max_steps * config.global_batch * train.per_device_train_batch_size / max(conversations, 1)

    if search is not None and not any(key.startswith(OTHER_FEATURES) for key in search.space):
        passes *= search.num_samples
    return passes


def _evaluations(config: RunConfig, passes: float) -> int:
    """How often the validation data are looked at: at each `eval_epochs`, and at the end."""
    every = config.evaluate.eval_epochs
    return max(1, math.ceil(passes / every)) if every else 1


def _evaluated_share(config: RunConfig, conversations: int) -> float:
    """The share of the validation data that an evaluation looks at."""
    most = config.evaluate.max_samples
    return 1.0 if most is None else min(1.0, most / max(conversations, 1))


def _lacks_room(folder: str, needed: int) -> str:
    """Why `needed` bytes are not written unasked; empty where there is room."""
    if not storage.is_local(folder):
        return f"they take {size(needed)}, and the room of a bucket is not known"
    free = shutil.disk_usage(Path(storage.absolute(folder))).free
    if needed > DISK_SHARE * free:
        return f"they take {size(needed)}, more than {DISK_SHARE:.0%} of the {size(free)} that are free"
    return ""


def _stand(folders: Folders, config: RunConfig) -> bool:
    """Whether the training shards have whole features already."""
    if not any(name.startswith("features-") for name in storage.list_dirs(folders.train)):
        return False  # the weights need not be hashed
    return is_whole(features_sidecar(folders.train, config), read_manifest(folders.train))
