"""Raw data -> canonical shards, as two Ray Data jobs: read tasks become sorted runs, slices of the order become shards.

In: a source (path, URI, glob, hub id). Out: `<out>/shard-*.parquet`, `<out>/quarantine/*.parquet` and, last,
`<out>/manifest.json`. A task holds one run or one shard in memory, whatever the size of the source. All finished work
has a marker: interrupted at any point, prepare resumes there, and the shards are the same to the last byte.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from typing import Any

import numpy as np

from smolray import storage
from smolray.config import ConfigError, DataConfig, RunConfig
from smolray.data.formats.discover import is_hub, list_read_tasks, read_rows, read_tasks_fingerprint, resolve
from smolray.data.formats.images import image_reader
from smolray.data.formats.layouts import parse
from smolray.data.formats.source import READ_TASK_BYTES, ReadTask, Source, SourceError, is_wrong_layout
from smolray.data.formats.unused import unused_columns, unused_message
from smolray.data.sample import SampleError
from smolray.data.shards import MANIFEST, SCHEMA_VERSION, ShardError, ShardFile, ShardManifest, read_manifest
from smolray.data.shuffle import (
    ReadTaskResult,
    Staging,
    duplicates,
    read_blocks,
    read_result,
    repeated_ids,
    run_read_task,
    total_bytes,
    write_shard,
)
from smolray.run.account import DataAccount, RowAccount

ReportProgress = Callable[[str, int, int], None]  # phase (read | write), tasks done, tasks in all
SETTINGS_THAT_MATTER = {"columns", "prompt", "max_image_pixels", "shard_bytes"}
# Of these only values other than the default matter: shards that were made before they existed stay valid.
LATER_SETTINGS: dict[str, Any] = {
    **dict.fromkeys(("ignore_columns", "option_answer", "answer_key"), True),
    **dict.fromkeys(("image_root", "allow_absolute_paths", "fetch_urls"), True),
    "columns": {"options", "context", "system"},
}
READER_THREADS = 16
CHECKED_ROWS = 16  # read before the work is started
STAGING_VERSION = 2  # of the files in a staging folder: an interrupted prepare of another version starts again


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
    for part in ("train", "validation"):
        if source := getattr(config.data, part):
            folder, data = shard_folder(config, part), _data_of(config, part)
            manifests[part] = (
                read_manifest(source)
                if folder == source
                else prepare(source, folder, data, config.seed, progress, before=inputs_before(config, part))
            )
    return manifests


def shard_folder(config: RunConfig, part: str) -> str:
    """Where the shards of "train" or "validation" are, or will be.

    The source itself where it is a shard folder; else `<data.shards>/<part>`, or where that is not set
    `<storage>/shards/<fingerprint>/<part>`, so that different sources do not meet. Raises SourceError where the source
    does not exist.
    """
    source, data = getattr(config.data, part), _data_of(config, part)
    if not is_hub(source, data) and storage.exists(storage.join(source, MANIFEST)):
        return source
    base = config.data.shards or storage.join(
        config.shards_dir, source_fingerprint(resolve(source, data), data, config.seed)
    )
    return storage.absolute(storage.join(base, part))


def inputs_before(config: RunConfig, part: str) -> int:
    """How many files the source of a part had when it was prepared last under this run's storage.

    0: never, or by a version that did not count them.
    """
    if config.data.shards:
        return 0  # shards of other files are refused there
    newest, inputs, source = 0.0, 0, getattr(config.data, part)
    for name in storage.list_dirs(config.shards_dir):
        uri = storage.join(config.shards_dir, name, part, MANIFEST)
        with suppress(FileNotFoundError, ShardError):
            written, manifest = storage.modified(uri), read_manifest(storage.join(config.shards_dir, name, part))
            if storage.absolute(manifest.source) == storage.absolute(source) and written > newest:
                newest, inputs = written, manifest.inputs
    return inputs


def prepare(
    source: str,
    out: str,
    data: DataConfig,
    seed: int = 0,
    progress: ReportProgress | None = None,
    task_bytes: int = READ_TASK_BYTES,
    before: int = 0,
) -> ShardManifest:
    """Turn raw data into shards under `out`; returns at once where they are there and whole.

    `before`: the files of this source at the last prepare, 0 for none; the account tells where there are fewer now.

    Needs an initialised Ray to do work.

    The result depends on the source's files (their names, sizes and times), the settings and the seed, not on
    `task_bytes` or the cluster. Raises SourceError (unreadable source, too many bad rows) and ShardError (`out` holds
    other shards).
    """
    out = storage.absolute(out)
    found = resolve(source, data)
    fingerprint = source_fingerprint(found, data, seed)
    if (manifest := _whole(out, fingerprint)) is not None:
        return manifest

    _require_ray()
    storage.require_writable(out, "the folder of the shards")
    tasks = list_read_tasks(found, task_bytes)
    if not tasks:
        raise SourceError(f"{source} holds no rows")
    check_layout(tasks, data)

    identity = f"{STAGING_VERSION}-{fingerprint}-{read_tasks_fingerprint(tasks)}"
    staging = Staging(storage.join(out, ".staging", identity), out)
    results = _run_read_tasks(tasks, staging, data, seed, progress)
    rows = RowAccount.total(result.rows for result in results)
    _check_bad(source, rows, results, staging, data)
    check_overlooked(source, rows, data)
    records = _write_shards(len(tasks), staging, data, progress)

    files = tuple(ShardFile(**r["file"]) for r in records if r["file"])
    conversations = sum(f.conversations for f in files)
    gone = max(0, before - len(found.files))
    account = DataAccount(source, conversations, rows, duplicates(staging, len(tasks)), gone=gone)
    manifest = ShardManifest(
        schema_version=SCHEMA_VERSION,
        source_fingerprint=fingerprint,
        rows=sum(f.rows for f in files),
        conversations=conversations,
        images=sum(r["images"] for r in records),
        quarantined=rows.quarantined,
        files=files,
        seed=seed,
        source=source,
        inputs=len(found.files),
        account=account.to_json(),
    )
    storage.write_bytes(storage.join(out, MANIFEST), manifest.to_json().encode())
    _clean(out, manifest)
    return manifest


def source_fingerprint(source: Source, data: DataConfig, seed: int) -> str:
    """Equal means the same shards: files of the source, the settings that shape rows, and the seed of the order."""
    settings = data.model_dump(mode="json", include=SETTINGS_THAT_MATTER, exclude=LATER_SETTINGS)
    changed = data.model_dump(mode="json", include=LATER_SETTINGS, exclude_defaults=True)
    settings |= changed | {"columns": settings["columns"] | changed.get("columns", {})}
    identity = [SCHEMA_VERSION, source.format, source.identity, source.split, source.revision, settings, seed]
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8).hexdigest()


def _data_of(config: RunConfig, part: str) -> DataConfig:
    """The data settings of a part.

    data.split is for training. A hub id for validation has its own `#split`, or the split of that name is taken.
    """
    if part == "train":
        return config.data
    split = "validation" if is_hub(config.data.validation, config.data) else ""
    return config.data.replace({"split": split})


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


def _run_read_tasks(
    tasks: Sequence[ReadTask], staging: Staging, data: DataConfig, seed: int, progress: ReportProgress | None
) -> list[ReadTaskResult]:
    """First pass: each read task without a marker is read into sorted runs."""
    done = {info.base_name for info in storage.list_files(storage.join(staging.folder, "tasks"))}
    todo = [n for n in range(len(tasks)) if f"task-{n:05d}.json" not in done]
    if len(todo) == len(tasks):
        storage.delete(storage.join(staging.out, "quarantine"))  # of an earlier source

    finished = _over(_read_task, todo, data.num_cpus_per_task, tasks=tasks, staging=staging, data=data, seed=seed)
    for count, _ in enumerate(finished, len(tasks) - len(todo) + 1):
        if progress:
            progress("read", count, len(tasks))

    with ThreadPoolExecutor(READER_THREADS) as pool:
        return list(pool.map(lambda n: read_result(staging, n), range(len(tasks))))


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


def _write_shards(
    tasks: int, staging: Staging, data: DataConfig, progress: ReportProgress | None
) -> list[dict[str, Any]]:
    """Second pass: slices of the order-key space become shards of about data.shard_bytes."""
    import ray

    with ThreadPoolExecutor(READER_THREADS) as pool:
        blocks = ray.put(np.concatenate(list(pool.map(lambda n: read_blocks(staging, n), range(tasks)))))
    repeated = ray.put(repeated_ids(staging, tasks))
    shards = max(1, round(total_bytes(staging, tasks) / data.shard_bytes))

    records = {}
    work = _over(
        _shard_task,
        range(shards),
        data.num_cpus_per_task,
        shards=shards,
        blocks=blocks,
        repeated=repeated,
        staging=staging,
    )
    for number, record in work:
        records[number] = record
        if progress:
            progress("write", len(records), shards)
    return [records[n] for n in range(shards)]


def _read_task(
    row: dict[str, Any], tasks: Sequence[ReadTask], staging: Staging, data: DataConfig, seed: int
) -> dict[str, Any]:
    number = int(row["item"])
    try:
        run_read_task(tasks[number], number, staging, data, seed)
    except SourceError as error:  # reported in its own words, not as the trace of a worker
        return {"item": number, "result": "", "error": str(error)}
    return {"item": number, "result": "{}", "error": ""}


def _shard_task(row: dict[str, Any], shards: int, blocks: Any, repeated: Any, staging: Staging) -> dict[str, Any]:
    import ray

    number = int(row["item"])
    record = write_shard(number, shards, ray.get(blocks), ray.get(repeated), staging)
    return {"item": number, "result": json.dumps(record), "error": ""}


def _over(
    task: Callable[..., dict[str, Any]], items: Sequence[int], num_cpus: float, **shared: Any
) -> Iterator[tuple[int, Any]]:
    """Run `task` over the items as one Ray Data job, one item a task, and yield (item, result) as they finish."""
    if not items:
        return
    import ray

    from smolray.data.ray_context import at_once, quiet_context

    quiet_context()
    data_set = ray.data.from_items([{"item": n} for n in items], override_num_blocks=len(items))
    made = data_set.map(task, fn_kwargs=shared, num_cpus=num_cpus, compute=at_once(1, len(items)))
    for row in made.iter_rows():
        if row["error"]:
            raise SourceError(row["error"])
        yield row["item"], json.loads(row["result"])


def _clean(out: str, manifest: ShardManifest) -> None:
    """Delete the staging and the shards of an earlier, unfinished prepare."""
    named = {file.name for file in manifest.files}
    for info in storage.list_files(out):
        if info.base_name.startswith("shard-") and info.base_name not in named:
            storage.delete(storage.join(out, info.base_name))
    storage.delete(storage.join(out, ".staging"))
