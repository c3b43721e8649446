"""Hugging Face hub data sets through `datasets`, streamed shard by shard and never downloaded whole.

In: an id (or a folder that `datasets` can load), split and revision. Out: read tasks (one for each shard of the
split) and their raw rows.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from smolray import storage
from smolray.data.formats.source import Format, Raw, ReadTask, Source, SourceError
from smolray.data.formats.tables import class_label


def resolve_hub(name: str, split: str, revision: str | None) -> Source:
    """The source of a hub data set, with its revision pinned: all workers and later starts read the same rows.

    Raises SourceError.
    """
    if storage.exists(name):
        files = [(f.path, f.size, f.mtime_ns) for f in storage.list_files(name, recursive=True)]
        identity = hashlib.blake2b(repr((split, files)).encode(), digest_size=16).hexdigest()
        return Source("hub", ((name, 0),), name, identity, split, revision)

    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(name, revision=revision).sha
    except Exception as error:  # the hub client has its own errors for missing, gated and unreachable data sets
        hint = "check the name, `hf auth login` for a gated one, or name local files instead"
        raise SourceError(
            f"hub data set {name!r} (revision {revision or 'main'}) cannot be reached: {error}; {hint}"
        ) from error
    identity = hashlib.blake2b(repr((name, commit, split)).encode(), digest_size=16).hexdigest()
    return Source("hub", ((name, 0),), name, identity, split, commit)


def cut_hub(whole: ReadTask, size: int, task_bytes: int) -> Iterator[ReadTask]:
    """One task for each shard (file) of the split. Raises SourceError."""
    name = whole.uri.rstrip("/").rsplit("/", 1)[-1]
    for shard in range(_load(whole.uri, whole.split, whole.revision).num_shards):
        yield replace(whole, name=f"{name}/{whole.split}-{shard:05d}", file=shard, start=shard, stop=shard + 1)


def read_hub(task: ReadTask) -> Iterator[Raw]:
    """The rows of one shard, with images still encoded and class labels as names. Raises SourceError."""
    data_set = _load(task.uri, task.split, task.revision)
    labels = {
        name: feature for name, feature in (data_set.features or {}).items() if type(feature).__name__ == "ClassLabel"
    }

    row = -1
    try:
        # Images stay encoded: prepare keeps the bytes as they came.
        for row, record in enumerate(data_set.decode(False).shard(data_set.num_shards, task.start)):
            fault, named = ("", ""), {}
            for name, feature in labels.items():
                if isinstance(record.get(name), int):
                    named[name], fault = class_label(name, record[name], feature.names, fault)
            yield Raw(row, {}, "", *fault) if fault[0] else Raw(row, {**record, **named})
    except Exception as error:  # builders raise any error; the message must name the place
        raise SourceError(
            f"hub data set {task.name} cannot be read after row {row}: {error}; re-run prepare to resume"
        ) from error


def _load(name: str, split: str, revision: str | None) -> Any:
    import datasets

    folder = storage.absolute(name) if storage.exists(name) else name
    try:
        return datasets.load_dataset(folder, split=split, streaming=True, revision=revision)
    except Exception as error:  # builders raise any error; the message must name the data set
        raise SourceError(f"hub data set {name!r}, split {split!r}: {error}") from error


HUB = Format("hub", cut_hub, read_hub)
