"""The sources of one part of the data: one path, or several that are mixed.

In: what a run names. Out: FoundSources with their files and the settings of their rows, ReadTasks over all of them, and
the identity of the whole.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from smolray import storage
from smolray.config import ConfigError, DataConfig
from smolray.data.formats.discover import is_hub, list_read_tasks, resolve
from smolray.data.formats.source import ReadTask, Source, SourceError
from smolray.data.repeats import kept_of_sources
from smolray.data.shards import MANIFEST, SCHEMA_VERSION

SETTINGS_THAT_MATTER = {"columns", "prompt", "max_image_pixels", "shard_bytes"}
# Of these only values other than the default matter: shards that were made before they existed stay valid.
LATER_SETTINGS: dict[str, Any] = {
    **dict.fromkeys(("ignore_columns", "option_answer", "answer_key"), True),
    **dict.fromkeys(("image_root", "allow_absolute_paths", "fetch_urls"), True),
    **dict.fromkeys(("max_samples", "validation_fraction"), True),
    "columns": {"options", "context", "system"},
}


@dataclass(frozen=True)
class FoundSource:
    """One source: its name, its files, and the settings with which its rows are read."""

    path: str
    source: Source
    data: DataConfig


def find_sources(data: DataConfig) -> list[FoundSource]:
    """The sources that `data.train` names. Raises SourceError where one of them is not there or cannot be mixed."""
    found = []
    for source in data.sources:
        settings = data.of_source(source)
        if is_prepared(source.path, settings):
            raise SourceError(
                f"{source.path} is a folder of prepared shards, which takes no settings of its own and is not mixed "
                "with other sources; name the raw data that it was made of"
            )
        found.append(FoundSource(source.path, resolve(source.path, settings), settings))
    return found


def is_prepared(path: str, data: DataConfig) -> bool:
    """Whether a source is a folder of prepared shards."""
    return not is_hub(path, data) and storage.exists(storage.join(path, MANIFEST))


def read_tasks(found: Sequence[FoundSource], task_bytes: int) -> list[ReadTask]:
    """The read tasks of all sources. `file` counts over all of them, and names say the source where there are several.

    Raises SourceError where a source holds no rows.
    """
    tasks: list[ReadTask] = []
    files = 0
    for number, one in enumerate(found):
        own = list_read_tasks(one.source, task_bytes)
        if not own:
            raise SourceError(f"{one.path} holds no rows")
        if len(found) > 1:
            own = [replace(t, file=t.file + files, name=f"{number}:{t.name}", source=number) for t in own]
        tasks += own
        files += len(one.source.files)
    return tasks


def fingerprint_of(found: Sequence[FoundSource], seed: int) -> str:
    """Equal means the same shards, of one source or of several in this order."""
    each = [source_fingerprint(one.source, one.data, seed) for one in found]
    return each[0] if len(each) == 1 else hashlib.blake2b(json.dumps(each).encode(), digest_size=8).hexdigest()


def source_fingerprint(source: Source, data: DataConfig, seed: int) -> str:
    """Equal means the same shards: files of the source, the settings that shape rows, and the seed of the order."""
    settings = data.model_dump(mode="json", include=SETTINGS_THAT_MATTER, exclude=LATER_SETTINGS)
    changed = data.model_dump(mode="json", include=LATER_SETTINGS, exclude_defaults=True)
    settings |= changed | {"columns": settings["columns"] | changed.get("columns", {})}
    identity = [SCHEMA_VERSION, source.format, source.identity, source.split, source.revision, settings, seed]
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8).hexdigest()


def repeats_of(data: DataConfig, index: pa.Table) -> tuple[float, ...]:
    """How often the conversations of each source are trained in an epoch; empty where all are trained once.

    A list in `data.train` says it, else `data.repeats`. `index`: of the shards of all sources. Raises ConfigError where
    a source with a weight has no conversation in it.
    """
    if isinstance(data.train, str):
        return data.repeats

    sources = data.train
    conversations = kept_of_sources(index, len(sources))
    if any(source.weight for source in sources):
        if empty := [source.path for source, n in zip(sources, conversations, strict=True) if not n]:
            raise ConfigError(f"data.train: {empty[0]} has a weight, and none of its conversations is trained")
        lengths = [n / (source.weight or 1) for source, n in zip(sources, conversations, strict=True)]
        repeats = tuple(max(lengths) / length for length in lengths)
    else:
        repeats = tuple(source.repeats or 1.0 for source in sources)
    return () if set(repeats) <= {1.0} else repeats
