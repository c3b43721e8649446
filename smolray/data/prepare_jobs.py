"""The two Ray Data jobs of `prepare`: read tasks become sorted runs, and slices of the order become shards.

In: read tasks and the settings of their sources. Out: what became of each, and a record of each shard. Finished work
has a marker, and is not done again.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from smolray import storage
from smolray.config import DataConfig
from smolray.data.formats.source import ReadTask, SourceError
from smolray.data.shuffle import (
    ReadTaskResult,
    read_blocks,
    read_result,
    repeated_ids,
    run_read_task,
    total_bytes,
    write_shard,
)
from smolray.data.split import WHOLE, Part
from smolray.data.staging import Staging

ReportProgress = Callable[[str, int, int], None]  # phase (read | write), tasks done, tasks in all
READER_THREADS = 16


@dataclass
class _Progress:
    """Counts the tasks of a phase, and reports each."""

    phase: str
    total: int
    report: ReportProgress | None
    done: int = 0

    def add(self) -> None:
        self.done += 1
        if self.report:
            self.report(self.phase, self.done, self.total)


def read_all(
    tasks: Sequence[ReadTask],
    staging: Staging,
    settings: Sequence[DataConfig],
    seed: int,
    progress: ReportProgress | None,
) -> list[ReadTaskResult]:
    """First pass: each read task without a marker is read into sorted runs. `settings`: of each source.

    The tasks of a source with max_samples are run one after another: nothing behind the last wanted row is read.
    """
    done = {info.base_name for info in storage.list_files(storage.join(staging.folder, "tasks"))}
    todo = {n for n in range(len(tasks)) if f"task-{n:05d}.json" not in done}
    if len(todo) == len(tasks):
        storage.delete(storage.join(staging.out, "quarantine"))  # of an earlier source

    counted = _Progress("read", len(tasks), progress, len(tasks) - len(todo))
    shared = {"tasks": tasks, "staging": staging, "settings": settings, "seed": seed}
    whole = [n for n in sorted(todo) if not settings[tasks[n].source].max_samples]
    for _ in _over(_read_task, whole, settings[0].num_cpus_per_task, limit=None, **shared):
        counted.add()

    left = {number: one.max_samples for number, one in enumerate(settings) if one.max_samples}
    for number, task in enumerate(tasks):
        if task.source not in left:
            continue
        limit = left[task.source]
        if number in todo and limit:
            for _ in _over(_read_task, [number], settings[0].num_cpus_per_task, limit=limit, **shared):
                counted.add()
        elif number in todo:
            run_read_task(task, number, staging, settings[task.source], seed, limit)
            counted.add()
        left[task.source] -= read_result(staging, number).conversations

    with ThreadPoolExecutor(READER_THREADS) as pool:
        return list(pool.map(lambda n: read_result(staging, n), range(len(tasks))))


def write_all(
    tasks: int, staging: Staging, data: DataConfig, progress: ReportProgress | None, part: Part = WHOLE
) -> list[dict[str, Any]]:
    """Second pass: slices of the order-key space become shards of about data.shard_bytes, of the rows of a part."""
    import ray

    with ThreadPoolExecutor(READER_THREADS) as pool:
        blocks = ray.put(np.concatenate(list(pool.map(lambda n: read_blocks(staging, n), range(tasks)))))
    repeated = ray.put(repeated_ids(staging, tasks))
    shards = max(1, round(part.share * total_bytes(staging, tasks) / data.shard_bytes))

    records = {}
    counted = _Progress("write", shards, progress)
    work = _over(
        _shard_task,
        range(shards),
        data.num_cpus_per_task,
        shards=shards,
        blocks=blocks,
        repeated=repeated,
        staging=staging,
        part=ray.put(part),
    )
    for number, record in work:
        records[number] = record
        counted.add()
    return [records[n] for n in range(shards)]


def _read_task(
    row: dict[str, Any],
    tasks: Sequence[ReadTask],
    staging: Staging,
    settings: Sequence[DataConfig],
    seed: int,
    limit: int | None,
) -> dict[str, Any]:
    number = int(row["item"])
    try:
        task = tasks[number]
        run_read_task(task, number, staging, settings[task.source], seed, limit)
    except SourceError as error:  # reported in its own words, not as the trace of a worker
        return {"item": number, "result": "", "error": str(error)}
    return {"item": number, "result": "{}", "error": ""}


def _shard_task(
    row: dict[str, Any], shards: int, blocks: Any, repeated: Any, staging: Staging, part: Any
) -> dict[str, Any]:
    import ray

    number = int(row["item"])
    record = write_shard(number, shards, ray.get(blocks), ray.get(repeated), staging, ray.get(part))
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
