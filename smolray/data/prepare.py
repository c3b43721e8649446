"""Raw data -> canonical shards, as two Ray Data jobs: read tasks become sorted runs, slices of the order become shards.

In: a source (path, URI, glob, hub id). Out: `<out>/shard-*.parquet`, `<out>/quarantine/*.parquet` and, last,
`<out>/manifest.json`. A task holds one run or one shard in memory, whatever the size of the source. All finished work
has a marker: interrupted at any point, prepare resumes there, and the shards are the same to the last byte.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from smolray import storage
from smolray.config import ConfigError, DataConfig, RunConfig, SourceConfig
from smolray.data.formats.discover import is_hub, read_rows, read_tasks_fingerprint
from smolray.data.formats.images import image_reader
from smolray.data.formats.layouts import parse
from smolray.data.formats.source import READ_TASK_BYTES, ReadTask, SourceError, is_wrong_layout
from smolray.data.formats.unused import unused_columns, unused_message
from smolray.data.prepare_jobs import ReportProgress, read_all, write_all
from smolray.data.sample import SampleError
from smolray.data.shards import (
    MANIFEST,
    PICTURES,
    SCHEMA_VERSION,
    ShardError,
    ShardFile,
    ShardManifest,
    read_manifest,
)
from smolray.data.shuffle import ReadTaskResult, duplicates, pictures, split_parts
from smolray.data.sources import FoundSource, find_sources, fingerprint_of, is_prepared, read_tasks
from smolray.data.staging import Staging
from smolray.run.account import DataAccount, RowAccount, SourceAccount

CHECKED_ROWS = 16  # read before the work is started
STAGING_VERSION = 3  # of the files in a staging folder: an interrupted prepare of another version starts again


def prepare_run(config: RunConfig, progress: ReportProgress | None = None) -> dict[str, ShardManifest]:
    """Prepare the train and validation data of a run into its shard folders.

    A source that is a shard folder already is read in place.

    Returns the manifests by "train" and "validation". Raises ConfigError, SourceError, ShardError.
    """
    if not config.data.train:
        raise ConfigError(
            "data.train is not set: name raw data (a path, glob, URI or hub data set id) or a folder of prepared shards"
        )
    manifests = {}
    for part in parts_of(config):
        folder, data = shard_folder(config, part), _data_of(config, part)
        if folder != data.train and not (part == "validation" and data.validation_fraction):
            held_out = shard_folder(config, "validation") if data.validation_fraction else ""
            before = inputs_before(config, part)
            prepare(data.train, folder, data, config.seed, progress, before=before, held_out=held_out)
        manifests[part] = read_manifest(folder)
    return manifests


def check_sources(config: RunConfig) -> None:
    """Look for the data of a run, without Ray and torch, so that a wrong path is told at once.

    Raises SourceError where a source is not there or cannot be mixed.
    """
    for part in parts_of(config) if config.data.train else ():
        data = _data_of(config, part)
        if not (isinstance(data.train, str) and is_prepared(data.train, data)):
            find_sources(data)


def parts_of(config: RunConfig) -> tuple[str, ...]:
    """The parts that a run has, "train" first."""
    return ("train", "validation") if config.data.evaluates else ("train",)


def shard_folder(config: RunConfig, part: str) -> str:
    """Where the shards of "train" or "validation" are, or will be.

    The source itself where it is a shard folder; else `<data.shards>/<part>`, or where that is not set
    `<storage>/shards/<fingerprint>/<part>`, so that different sources do not meet. Raises SourceError where the source
    does not exist.
    """
    data = _data_of(config, part)
    if isinstance(data.train, str) and is_prepared(data.train, data):
        for name in ("validation_fraction", "max_samples"):
            if value := getattr(data, name):
                raise ConfigError(
                    f"data.{name} = {value} with {data.train}: these shards are prepared already; name the raw data "
                    "that they were made of"
                )
        return data.train
    base = config.data.shards or storage.join(config.shards_dir, fingerprint_of(find_sources(data), config.seed))
    return storage.absolute(storage.join(base, part))


def with_leak(account: DataAccount, train: str, validation: str) -> DataAccount:
    """The account of validation data with the images that the training shards hold as well.

    That is known where both folders say which images they have.
    """
    try:
        trained, held = (
            np.frombuffer(storage.read_bytes(storage.join(folder, PICTURES)), "u8") for folder in (train, validation)
        )
    except FileNotFoundError:
        return account  # shards of a version that kept no images, or the one held out of the other
    return replace(account, leaked=len(np.intersect1d(trained, held, assume_unique=True)), pictures=len(held))


def inputs_before(config: RunConfig, part: str) -> int:
    """How many files the source of a part had when it was prepared last under this run's storage.

    0: never, or by a version that did not count them.
    """
    if config.data.shards:
        return 0  # shards of other files are refused there
    newest, inputs, source = 0.0, 0, _told(_data_of(config, part))
    for name in storage.list_dirs(config.shards_dir):
        uri = storage.join(config.shards_dir, name, part, MANIFEST)
        with suppress(FileNotFoundError, ShardError):
            written, manifest = storage.modified(uri), read_manifest(storage.join(config.shards_dir, name, part))
            if storage.absolute(manifest.source) == storage.absolute(source) and written > newest:
                newest, inputs = written, manifest.inputs
    return inputs


def prepare(
    source: str | tuple[SourceConfig, ...],
    out: str,
    data: DataConfig,
    seed: int = 0,
    progress: ReportProgress | None = None,
    task_bytes: int = READ_TASK_BYTES,
    before: int = 0,
    held_out: str = "",
) -> ShardManifest:
    """Turn raw data into shards under `out`; returns at once where they are there and whole.

    `before`: the files of these sources at the last prepare, 0 for none; the account tells where there are fewer now.
    `held_out`: the folder for the shards of what `data.validation_fraction` holds out.

    Needs an initialised Ray to do work.

    The result depends on the source's files (their names, sizes and times), the settings and the seed, not on
    `task_bytes` or the cluster. Raises SourceError (unreadable source, too many bad rows) and ShardError (`out` holds
    other shards).
    """
    out, data = storage.absolute(out), data.replace({"train": source})
    found = find_sources(data)
    fingerprint = fingerprint_of(found, seed)
    manifest, other = _whole(out, fingerprint), _whole(held_out, fingerprint) if held_out else None
    if manifest is not None and (other is not None or not held_out):
        return manifest

    _require_ray()
    storage.require_writable(out, "the folder of the shards")
    tasks = read_tasks(found, task_bytes)
    settings = [one.data for one in found]
    for number, one in enumerate(settings):
        check_layout([task for task in tasks if task.source == number], one)

    identity = f"{STAGING_VERSION}-{fingerprint}-{read_tasks_fingerprint(tasks)}"
    staging = Staging(storage.join(out, ".staging", identity), out)
    results = read_all(tasks, staging, settings, seed, progress)
    rows = RowAccount.total(result.rows for result in results)
    told, inputs = _told(data), sum(len(one.source.files) for one in found)
    _check_bad(told, rows, results, staging, data)
    check_overlooked(told, rows, data)

    number = len(results)
    gone = max(0, before - inputs)
    account = DataAccount(told, 0, rows, duplicates(staging, number), gone=gone, sources=_of_sources(found, results))
    whole = ShardManifest(SCHEMA_VERSION, fingerprint, 0, 0, 0, rows.quarantined, (), seed, told, inputs)
    if not held_out:
        storage.write_bytes(storage.join(out, PICTURES), pictures(staging, number).tobytes())
        return _finish(whole, account, staging, write_all(number, staging, data, progress))

    apart, rest = split_parts(staging, number, data.validation_fraction)
    beside = replace(staging, out=storage.absolute(held_out), part="validation")
    records = write_all(number, beside, data, progress, apart)
    aside = _finish(replace(whole, quarantined={}), DataAccount(told, 0), beside, records)
    account = replace(account, held_out=aside.conversations)
    return _finish(whole, account, staging, write_all(number, staging, data, progress, rest))


def _finish(
    manifest: ShardManifest, account: DataAccount, staging: Staging, records: Sequence[dict[str, Any]]
) -> ShardManifest:
    """Write the manifest of shards that are all there, and clear away what is no longer needed."""
    files = tuple(ShardFile(**r["file"]) for r in records if r["file"])
    conversations = sum(f.conversations for f in files)
    manifest = replace(
        manifest,
        rows=sum(f.rows for f in files),
        conversations=conversations,
        images=sum(r["images"] for r in records),
        files=files,
        account=replace(account, conversations=conversations).to_json(),
    )
    storage.write_bytes(storage.join(staging.out, MANIFEST), manifest.to_json().encode())
    _clean(staging.out, manifest)
    return manifest


def _of_sources(found: Sequence[FoundSource], results: Sequence[ReadTaskResult]) -> tuple[SourceAccount, ...]:
    """The account of each source, where there are several."""
    counts: Counter[int] = Counter()
    for result in results:
        counts[result.source] += result.conversations
    each = tuple(SourceAccount(one.path, counts[number]) for number, one in enumerate(found))
    return each if len(each) > 1 else ()


def _told(data: DataConfig) -> str:
    """The sources of a part in words."""
    return ", ".join(source.path for source in data.sources)


def _data_of(config: RunConfig, part: str) -> DataConfig:
    """The data settings of a part, with its sources as `train`.

    data.split is for training. A hub id for validation has its own `#split`, or the split of that name is taken.
    Held-out data are a part of the training sources.
    """
    if part == "train" or not config.data.validation:
        return config.data
    split = "validation" if is_hub(config.data.validation, config.data) else ""
    own = {"train": config.data.validation, "max_samples": None, "validation_fraction": 0.0}
    return config.data.replace({"split": split, **own})


def _whole(out: str, fingerprint: str) -> ShardManifest | None:
    """The manifest of a finished prepare of the same source. Raises ShardError where `out` holds other shards."""
    if not storage.exists(storage.join(out, MANIFEST)):
        return None
    manifest = read_manifest(out)
    if manifest.source_fingerprint != fingerprint:
        raise ShardError(
            f"{out} already holds shards of another source, other settings or another seed "
            f"(fingerprint {manifest.source_fingerprint}, wanted {fingerprint}; made of "
            f"{f'{manifest.inputs:,} files of ' if manifest.inputs else ''}{manifest.source}); "
            "choose another folder with data.shards, or delete this one"
        )
    sizes = {info.base_name: info.size for info in storage.list_files(out)}
    if all(sizes.get(file.name) == file.bytes for file in manifest.files):
        return manifest
    storage.delete(storage.join(out, MANIFEST))  # a shard is gone or torn: they are made again
    return None


def _require_ray() -> None:
    import ray

    if not ray.is_initialized():
        raise RuntimeError(
            "prepare needs Ray: call ray.init() first (address='auto' on a cluster), or use `smolray prepare`"
        )


def check_layout(tasks: Sequence[ReadTask], data: DataConfig) -> None:
    """Fail now, not after hours, where the first rows cannot be used.

    They all lack the columns or are no records, or one has a column that matters and stands unused. Raises SourceError.
    """
    faults, usable = [], False
    rows = ((task, raw) for task in tasks for raw in read_rows(task))
    for task, raw in islice(rows, CHECKED_ROWS):
        images = image_reader(task, data)
        try:
            if raw.reason:
                raise SampleError(raw.reason, raw.message)
            parsed = parse(raw.record, "", data, images)
        except SampleError as error:
            faults.append(error)
            continue

        usable = True
        if unused := unused_columns(raw.record, parsed, data):
            raise SourceError(unused_message(task.uri, unused))

    if faults and not usable and all(is_wrong_layout(f.reason) for f in faults):
        raise SourceError(f"{tasks[0].uri}: {faults[0]}")


def _check_bad(
    source: str, rows: RowAccount, results: Sequence[ReadTaskResult], staging: Staging, data: DataConfig
) -> None:
    """Raise SourceError where no row is left or the share of bad ones is above data.max_bad_fraction."""
    counts = Counter(rows.quarantined)
    bad = counts.total()
    if rows.rows == 0:
        raise SourceError(f"{source} holds no rows")
    if bad > data.max_bad_fraction * rows.rows or bad == rows.rows:
        examples = [e for r in results for e in r.examples][:5]
        raise SourceError(
            f"{bad} of {rows.rows} rows of {source} are bad, "
            f"more than data.max_bad_fraction = {data.max_bad_fraction} allows\n"
            + "".join(f"  {reason}: {count}\n" for reason, count in counts.most_common())
            + "".join(f"  {row_id}: {reason}: {message}\n" for row_id, reason, message in examples)
            + f"All of them are in {storage.join(staging.out, 'quarantine')}; "
            "mend the source or raise data.max_bad_fraction"
        )


def check_overlooked(source: str, rows: RowAccount, data: DataConfig) -> None:
    """Raise SourceError where a column that matters stands unused in a larger share of the rows than may be bad.

    In fewer rows it is told with the account.
    """
    for column, count in rows.overlooked.items():
        if count > data.max_bad_fraction * rows.rows:
            raise SourceError(f"{source}: in {count:,} of {rows.rows:,} rows {column}")


def _clean(out: str, manifest: ShardManifest) -> None:
    """Delete the staging and the shards of an earlier, unfinished prepare."""
    named = {file.name for file in manifest.files}
    for info in storage.list_files(out):
        if info.base_name.startswith("shard-") and info.base_name not in named:
            storage.delete(storage.join(out, info.base_name))
    storage.delete(storage.join(out, ".staging"))
