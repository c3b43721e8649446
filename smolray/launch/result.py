"""After training: result.json and the report.

In: the record of rank 0 and the run's events. Out: both files in the run's folder.
"""

import json
from typing import Any

from smolray import storage
from smolray.config import RunConfig, to_yaml
from smolray.data.answers import count_answers
from smolray.data.ray_jobs import map_shards
from smolray.data.reader import Folders, ShardReader
from smolray.data.shards import read_manifest
from smolray.evaluate.baseline import blind_baseline
from smolray.report.run import write_report
from smolray.run import checkpoint
from smolray.run.events import Event, account_of, read_events, surviving
from smolray.run.folder import RunFolder
from smolray.run.predictions import read_predictions
from smolray.run.result import read_result


def finished_result(config: RunConfig) -> dict[str, Any]:
    """result.json of a run that finished with exactly these settings and still has its last checkpoint, else {}.

    Raises RunFileError where it is damaged.
    """
    stored, settings = read_result(config.run_dir), RunFolder(config.run_dir).config
    if not (stored and storage.exists(settings) and storage.read_bytes(settings) == to_yaml(config).encode()):
        return {}

    last = checkpoint.latest(config.run_dir)
    whole = stored.get("status") == "finished" and last is not None and last.step == stored.get("steps")
    return stored if whole else {}


def finish(config: RunConfig, folders: Folders, record: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Add what the driver knows, and write result.json and the report."""
    history = surviving(read_events(config.run_dir))
    steps = [e for e in history if e["event"] == "step"]
    trained = sum(e["seconds"] for e in steps)

    result = {
        "name": config.name,
        **record,
        "seconds": round(seconds, 1),
        "train_seconds": round(trained, 1),
        "data_wait_share": round(sum(e["data_wait_seconds"] for e in steps) / trained, 4) if trained else None,
        "samples_per_second": round(sum(e["samples"] for e in steps) / trained, 1) if trained else None,
        "peak_memory_bytes": max((e["memory_bytes"] for e in steps), default=0),
        "final_loss": steps[-1]["loss"] if steps else None,
        "data": account_of(history),
        "versions": _newest(history, "start").get("versions", {}),
    }

    # In a search for images there is no answer that the question alone could give away.
    if record["accuracy"] and config.traits.evaluation == "answers":
        training = map_shards(folders.train, read_manifest(folders.train), count_answers, config.data.num_cpus_per_task)
        step = max(e["step"] for e in history if e["event"] == "evaluate")
        result["blind_baseline"] = round(blind_baseline(training, read_predictions(config.run_dir, step)), 4)

    storage.write_bytes(RunFolder(config.run_dir).result, json.dumps(result, indent=1).encode())
    write_report(config.run_dir, report_images(config, folders))
    return result


def report_images(config: RunConfig, folders: Folders) -> dict[str, bytes]:
    """A few validation images by row key, whose predictions the report shows."""
    if not folders.validation:
        return {}
    images: dict[str, bytes] = {}
    for row in ShardReader.open(folders.validation).rows():
        if len(images) >= config.evaluate.samples_in_report:
            break
        if row.images:
            images[row.key] = row.images[0]
    return images


def _newest(history: list[Event], kind: str) -> Event:
    return next((e for e in reversed(history) if e["event"] == kind), {})
