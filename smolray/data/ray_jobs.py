"""Ray Data jobs over shards: one function applied to every shard, and the index that such a job makes."""

from collections.abc import Callable, Sequence

import pyarrow as pa
import ray

from smolray import storage
from smolray.config import RunConfig
from smolray.data.encode import cached_encoder
from smolray.data.index import index_shard, index_uri, longest_kept, read_index, write_index
from smolray.data.max_length import chosen_length
from smolray.data.ray_context import at_once, quiet_context
from smolray.data.shards import ShardManifest, read_manifest

ShardFunction = Callable[[str, str, int], pa.Table]  # folder, file name, number of the shard


def map_shards(folder: str, manifest: ShardManifest, function: ShardFunction, num_cpus: float) -> list[pa.Table]:
    """`function` of every shard, as Ray Data tasks; tables in shard order.

    A single shard is read here: there is nothing to share out, and a job of Ray Data would take seconds to start.
    """
    if len(manifest.files) == 1:
        return [function(folder, manifest.files[0].name, 0)]
    quiet_context()

    def run(batch: pa.Table) -> pa.Table:
        tables = [
            function(folder, name.as_py(), number.as_py())
            for name, number in zip(batch["name"], batch["number"], strict=True)
        ]
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

        write_index(
            uri, pa.concat_tables(map_shards(folder, read_manifest(folder), run, config.data.num_cpus_per_task))
        )
    return uri


def with_max_length(config: RunConfig, folders: Sequence[str]) -> RunConfig:
    """The run with data.max_length as a number, and with an index of each folder for it (data/max_length.py)."""
    if config.data.max_length == "auto":
        indexes = [read_index(ensure_index(folder, config)) for folder in folders]
        most = cached_encoder(config.model, config.data, config.image).max_length
        config = config.replace({"data.max_length": chosen_length(indexes, config, most)})
        encoder = cached_encoder(config.model, config.data, config.image)
        for folder, index in zip(folders, indexes, strict=True):
            uri = index_uri(folder, encoder)
            if not storage.exists(uri) and longest_kept(index) <= encoder.max_length:
                write_index(uri, index)  # a lower limit that leaves out no more changes nothing
    for folder in folders:
        ensure_index(folder, config)
    return config


def load_index(folder: str, config: RunConfig) -> pa.Table:
    """The index that `ensure_index` made. Raises FileNotFoundError where it did not."""
    return read_index(index_uri(folder, cached_encoder(config.model, config.data, config.image)))
