"""Ray Data jobs that write sidecars: one table for each shard, made wherever the cluster has room.

In: a shard folder and a function of one shard, or a run that wants vision features or reference log-probabilities. Out:
tables in shard order, or the URIs of sidecars that are whole.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from ray.data import ActorPoolStrategy

from smolray import storage
from smolray.cluster.connect import native_errors_in_log
from smolray.config import ConfigError, RunConfig
from smolray.data.ray_context import at_once, cluster_capacity, quiet_context
from smolray.data.ray_jobs import load_index
from smolray.data.reader import Sidecars
from smolray.data.shards import read_manifest
from smolray.data.sidecar import complete, is_whole
from smolray.precompute.features import FeatureWriter, features_bytes, features_sidecar
from smolray.precompute.logps import LogpsWriter, logps_sidecar
from smolray.run.progress import size

WriterMaker = Callable[[torch.device, int], FeatureWriter | LogpsWriter]  # device, threads that decode images
Say = Callable[[str], None]
DECODERS = 8  # threads that decode images for a GPU


def ensure_sidecars(folder: str, config: RunConfig, reference: bool = True, say: Say = print) -> Sidecars:
    """The sidecars that the run needs for these shards; those that are missing are made. Their index must be there.

    Without `reference` no log-probabilities.
    """
    features = ensure_features(folder, config, say) if config.model.vision_features == "precompute" else ""
    wanted = reference and config.reference_model == "precompute"
    return Sidecars(features, ensure_logps(folder, config, features, say) if wanted else "")


def ensure_features(folder: str, config: RunConfig, say: Say = print) -> str:
    """The URI of the features of the run's frozen prefix for the shards in `folder`.

    Their size is reported before they are written.

    Raises ConfigError where a local disk has no room for them and ShardError where the manifest of those that are there
    is damaged.
    """
    sidecar, shards = features_sidecar(folder, config), read_manifest(folder)

    def make(todo: list[int]) -> None:
        each = features_bytes(load_index(folder, config), config, len(shards.files))
        left = int(each[todo].sum())
        what = f"{sidecar.about['tokens']} tokens x {sidecar.about['hidden']} in {sidecar.about['dtype']} a tile"
        say(f"vision features: {size(int(each.sum()))} ({what}), {size(left)} of it to be made, in {sidecar.uri}")
        require_space(sidecar.uri, left)
        _write_tables(
            [shards.files[n].name for n in todo],
            lambda device, threads: FeatureWriter(sidecar, config, device, threads),
            config,
            lambda done: say(f"vision features: {done} of {len(todo)} shards"),
        )

    return complete(sidecar, shards, make)


def found_features(folder: str, config: RunConfig) -> str:
    """The URI of the features where the run wants them and they are there, else an empty one.

    Raises ShardError where they are damaged.
    """
    if config.model.vision_features != "precompute":
        return ""
    sidecar = features_sidecar(folder, config)
    return sidecar.uri if is_whole(sidecar, read_manifest(folder)) else ""


def ensure_logps(folder: str, config: RunConfig, features: str = "", say: Say = print) -> str:
    """The URI of the reference model's log-probabilities for the pairs in `folder`.

    `features`: URI of those to read in place of images.
    """
    sidecar, shards = logps_sidecar(folder, config), read_manifest(folder)

    def make(todo: list[int]) -> None:
        def writer(device: torch.device, threads: int) -> LogpsWriter:
            return LogpsWriter(sidecar, config, device, load_index(folder, config), features)

        say(
            f"reference log-probabilities: of {sum(shards.files[n].conversations for n in todo)} pairs, in "
            f"{sidecar.uri}"
        )
        _write_tables(
            [shards.files[n].name for n in todo],
            writer,
            config,
            lambda done: say(f"reference log-probabilities: {done} of {len(todo)} shards"),
        )

    return complete(sidecar, shards, make)


def require_space(uri: str, needed: int) -> None:
    """Raise ConfigError where `needed` bytes do not fit on the local disk that will hold `uri`."""
    if not storage.is_local(uri):
        return
    there = next(folder for folder in Path(storage.absolute(uri)).parents if folder.exists())
    if needed > (free := shutil.disk_usage(there).free):
        raise ConfigError(
            f"model.vision_features = precompute needs {size(needed)} in {uri}, {size(free)} are free there; "
            "nearest: model.vision_features=compute, or a lower image.max_tiles"
        )


class _TableActor:
    """A Ray Data actor that holds one model and writes one table after another.

    Rows in and out: the names of the shards.
    """

    def __init__(self, maker: WriterMaker, gpu: bool):
        if not gpu:
            torch.set_num_threads(1)  # there is an actor for each core
        self.writer = maker(torch.device("cuda" if gpu else "cpu"), min(DECODERS, os.cpu_count() or 1) if gpu else 1)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for name in batch["name"]:
            self.writer.write(str(name))
        return batch


def _write_tables(names: Sequence[str], maker: WriterMaker, config: RunConfig, done: Callable[[int], None]) -> None:
    """Have the tables of those shards written: on every GPU of the cluster, or on as many CPUs as it has."""
    quiet_context()
    gpus = int(cluster_capacity().get("GPU", 0)) if config.resources.use_gpu != "no" else 0
    actors = min(gpus, len(names)) if gpus else at_once(1, len(names)).size

    # a shard that waits behind another could be made elsewhere
    pool = ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1)
    pieces = ray.data.from_items([{"name": name} for name in names], override_num_blocks=len(names))

    made = pieces.map_batches(
        _TableActor,
        fn_constructor_args=(maker, bool(gpus)),
        batch_size=1,
        compute=pool,
        num_cpus=config.data.num_cpus_per_task,
        num_gpus=1 if gpus else None,
    )
    with native_errors_in_log():
        for count, _ in enumerate(made.iter_rows(), start=1):
            done(count)
