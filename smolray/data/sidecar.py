"""Ray Data jobs whose results stand beside the shards: one table per shard, made where there is room in the cluster.

In: a shard folder and a function of one shard, or a run that wants vision features or reference log-probabilities. Out: tables in shard
order, or the URIs of sidecars that are whole.
"""

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from smolray import storage
from smolray.config import ConfigError, RunConfig
from smolray.data.beside import complete, is_whole
from smolray.data.encode import cached_encoder
from smolray.data.features import FeatureWriter, features_bytes, features_sidecar
from smolray.data.index import index_shard, index_uri, read_index, write_index
from smolray.data.logps import LogpsWriter, logps_sidecar
from smolray.data.reader import Sidecars
from smolray.data.shards import Manifest, read_manifest
from smolray.progress import size

ShardFunction = Callable[[str, str, int], pa.Table]  # folder, file name, number of the shard
WriterMaker = Callable[[torch.device, int], FeatureWriter | LogpsWriter]  # device, threads beside it
Say = Callable[[str], None]
DECODERS = 8  # threads that decode images beside a GPU


def quiet_context() -> ray.data.DataContext:
    """Ray Data without progress bars and start-up notes: our own progress line says what matters."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # that its bars are off is meant
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return context


def at_once(consumers: int, tasks: int) -> TaskPoolStrategy:
    """As many tasks at a time as the cluster has cores for each of `consumers` pipelines: a share of a CPU lets tasks run beside other
    work, but by itself it would start several busy processes a core."""
    return TaskPoolStrategy(size=max(1, min(tasks, int(ray.cluster_resources().get("CPU", 1)) // consumers)))


def map_shards(folder: str, manifest: Manifest, function: ShardFunction, num_cpus: float) -> list[pa.Table]:
    """`function` of every shard, as Ray Data tasks; tables in shard order."""
    quiet_context()

    def run(batch: pa.Table) -> pa.Table:
        tables = [function(folder, name.as_py(), number.as_py()) for name, number in zip(batch["name"], batch["number"], strict=True)]
        sinks = []
        for table in tables:
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
            sinks.append(sink.getvalue().to_pybytes())
        return pa.table({"number": batch["number"], "table": pa.array(sinks, pa.large_binary())})

    items = [{"number": i, "name": f.name} for i, f in enumerate(manifest.files)]
    pieces = ray.data.from_items(items, override_num_blocks=len(items))
    rows = pieces.map_batches(run, batch_format="pyarrow", num_cpus=num_cpus, compute=at_once(1, len(items))).take_all()
    return [pa.ipc.open_stream(row["table"]).read_all() for row in sorted(rows, key=lambda r: r["number"])]


def ensure_index(folder: str, config: RunConfig) -> str:
    """The URI of the index of `folder` for the run's processor, made now if it is not there."""
    encoder = cached_encoder(config.model, config.data, config.image)
    uri = index_uri(folder, encoder)
    if not storage.exists(uri):
        settings = (config.model, config.data, config.image)

        def run(folder: str, name: str, number: int) -> pa.Table:
            return index_shard(folder, name, number, cached_encoder(*settings))

        write_index(uri, pa.concat_tables(map_shards(folder, read_manifest(folder), run, config.data.num_cpus_per_task)))
    return uri


def load_index(folder: str, config: RunConfig) -> pa.Table:
    """The index that `ensure_index` made. Raises FileNotFoundError where it did not."""
    return read_index(index_uri(folder, cached_encoder(config.model, config.data, config.image)))


def ensure_sidecars(folder: str, config: RunConfig, reference: bool = True, say: Say = print) -> Sidecars:
    """What the run wants beside these shards, made now as far as it is not there; their index must be. Without `reference` no log-probabilities."""
    features = ensure_features(folder, config, say) if config.model.vision_features == "precompute" else ""
    wanted = reference and config.method == "dpo" and config.dpo.reference == "precompute"
    return Sidecars(features, ensure_logps(folder, config, features, say) if wanted else "")


def ensure_features(folder: str, config: RunConfig, say: Say = print) -> str:
    """The URI of the features of the run's frozen front for the shards in `folder`. Their size is said before they are written.

    Raises ConfigError where a local disk has no room for them and ShardError where the manifest of those that are there is damaged.
    """
    sidecar, shards = features_sidecar(folder, config), read_manifest(folder)

    def make(todo: list[int]) -> None:
        each = features_bytes(load_index(folder, config), config, len(shards.files))
        left = int(each[todo].sum())
        what = f"{sidecar.about['tokens']} tokens x {sidecar.about['hidden']} in {sidecar.about['dtype']} a tile"
        say(f"vision features: {size(int(each.sum()))} ({what}), {size(left)} of it to be made, in {sidecar.uri}")
        require_space(sidecar.uri, left)
        _write_tables([shards.files[n].name for n in todo], lambda device, threads: FeatureWriter(sidecar, config, device, threads), config,
                      lambda done: say(f"vision features: {done} of {len(todo)} shards"))  # fmt: skip

    return complete(sidecar, shards, make)


def found_features(folder: str, config: RunConfig) -> str:
    """The URI of the features where the run wants them and they are there, else an empty one. Raises ShardError where they are damaged."""
    if config.model.vision_features != "precompute":
        return ""
    sidecar = features_sidecar(folder, config)
    return sidecar.uri if is_whole(sidecar, read_manifest(folder)) else ""


def ensure_logps(folder: str, config: RunConfig, features: str = "", say: Say = print) -> str:
    """The URI of the reference model's log-probabilities for the pairs in `folder`; `features`: URI of those to read in place of images."""
    sidecar, shards = logps_sidecar(folder, config), read_manifest(folder)

    def make(todo: list[int]) -> None:
        def writer(device: torch.device, threads: int) -> LogpsWriter:
            return LogpsWriter(sidecar, config, device, load_index(folder, config), features)

        say(f"reference log-probabilities: of {sum(shards.files[n].conversations for n in todo)} pairs, in {sidecar.uri}")
        _write_tables([shards.files[n].name for n in todo], writer, config,
                      lambda done: say(f"reference log-probabilities: {done} of {len(todo)} shards"))  # fmt: skip

    return complete(sidecar, shards, make)


def require_space(uri: str, needed: int) -> None:
    """Raise ConfigError where `needed` bytes do not fit on the local disk that will hold `uri`."""
    if not storage.is_local(uri):
        return
    there = next(folder for folder in Path(storage.absolute(uri)).parents if folder.exists())
    if needed > (free := shutil.disk_usage(there).free):
        raise ConfigError(f"model.vision_features = precompute needs {size(needed)} in {uri}, {size(free)} are free there; "
                          "nearest: model.vision_features=compute, or a lower image.max_tiles")  # fmt: skip


class _TableActor:
    """A Ray Data actor that holds one model and writes one table after another. Rows in and out: the names of the shards."""

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
    gpus = int(ray.cluster_resources().get("GPU", 0)) if config.resources.use_gpu != "no" else 0
    actors = min(gpus, len(names)) if gpus else at_once(1, len(names)).size
    pool = ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1)  # a shard that waits behind another could be made elsewhere
    pieces = ray.data.from_items([{"name": name} for name in names], override_num_blocks=len(names))
    made = pieces.map_batches(_TableActor, fn_constructor_args=(maker, bool(gpus)), batch_size=1, compute=pool,
                              num_cpus=config.data.num_cpus_per_task, num_gpus=1 if gpus else None)  # fmt: skip
    for count, _ in enumerate(made.iter_rows(), start=1):
        done(count)
