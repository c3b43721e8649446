"""From a RunConfig to a finished run: shards, index, Ray Train, result.

In: a validated config and a Ray cluster. Out: the run folder with result.json, and its record. The driver prepares and asks; workers train.
"""

import ipaddress
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train import FailureConfig, ScalingConfig, TrainingFailedError
from ray.train import RunConfig as TrainRunConfig
from ray.train.torch import TorchConfig, TorchTrainer

from smolray import auto, checkpoint, storage
from smolray.background import beside
from smolray.config import ConfigError, RunConfig, check_run, load_config, to_yaml
from smolray.data.prepare import prepare_run, shard_folder
from smolray.data.reader import ShardReader, Sidecars
from smolray.data.shards import read_manifest
from smolray.data.sidecar import ensure_index, ensure_sidecars, found_features, load_index, map_shards
from smolray.elastic import NEVER, Growth
from smolray.evaluate.baseline import TEXT_SHARDS, blind_baseline, count_answers, distinct_texts
from smolray.evaluate.evaluator import read_predictions
from smolray.evaluate.report import write_report
from smolray.events import Event, EventLog, EventTail, read_events, surviving
from smolray.export import chosen_checkpoint
from smolray.model.tiny import SHAPES, build_model
from smolray.planner.plan import with_settings
from smolray.planner.statistics import DataStatistics
from smolray.progress import event_line
from smolray.resources import check_resources, most_workers, use_gpu
from smolray.start import train_function
from smolray.status import RESIZED, STOP_FLAG
from smolray.survey import Survey
from smolray.validation import Folders


class RunError(ValueError):
    """The run ended in a way that starting its workers again cannot mend, such as a non-finite loss."""


def connect() -> None:
    """Join the cluster that RAY_ADDRESS names (a submitted job has it), else start a local Ray of this machine's cores.

    A Ray of our own asks for a token (Ray makes one where there is none): it listens on the machine's address, and who reaches it may run code.
    Raises ConfigError where the environment turns that off on a machine with a network.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns in every process that it found no card
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "600000")  # a data task's process takes seconds to import torch: kept for the next
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    else:
        refuse_open_head(os.environ.get("RAY_AUTH_MODE", "token"), ray.util.get_node_ip_address())
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)


def launch_run(config: RunConfig) -> dict[str, Any]:
    """Run to the end or to a stop, from the newest checkpoint if there is one. Returns what `result.json` holds.

    Raises ResourcesError within seconds where the cluster is too small, and the worker's own error when its restarts are used up.
    """
    began = time.time()
    refuse_lost_storage(config)
    connect()
    begun = storage.exists(storage.join(config.run_dir, "config.yaml"))
    config = auto.bounded(with_fixed_batch(with_absolute_paths(config)))
    check_resources(config, ray.cluster_resources())
    storage.delete(storage.join(config.run_dir, STOP_FLAG))
    config, folders = prepare_data(config)
    if finished := finished_result(config):
        return finished
    storage.delete(storage.join(config.run_dir, "result.json"))  # what is stopped or killed from here on has none
    if config.engine.name != "auto":
        storage.write_bytes(storage.join(config.run_dir, "config.yaml"), to_yaml(config).encode())
    with shown_progress(config):
        try:
            record = fit_planned(config, folders, begun) if config.engine.name == "auto" else fit(config, folders)
        except Exception as error:
            EventLog(config.run_dir).write("end", status="failed", error=f"{type(error).__name__}: {error}"[:2000])
            raise
        if "error" in record:
            EventLog(config.run_dir).write("end", status="failed", error=record["error"])
            raise RunError(record["error"])
    return finish(config, folders, record, time.time() - began)


def finished_result(config: RunConfig) -> dict[str, Any]:
    """result.json of a run that has finished under just these settings and still has its last checkpoint; else nothing."""
    result, settings = (storage.join(config.run_dir, name) for name in ("result.json", "config.yaml"))
    if not (storage.exists(result) and storage.exists(settings) and storage.read_bytes(settings).decode() == to_yaml(config)):
        return {}
    told, last = json.loads(storage.read_bytes(result)), checkpoint.latest(config.run_dir)
    return told if told["status"] == "finished" and last is not None and last.step == told["steps"] else {}


def refuse_open_head(auth_mode: str, address: str) -> None:
    """Raise ConfigError where a Ray started here would let in whoever reaches `address`."""
    if auth_mode.lower() != "token" and not ipaddress.ip_address(address).is_loopback:
        raise ConfigError(f"RAY_AUTH_MODE = {auth_mode!r} would start a Ray on {address} in which everyone who reaches it may run code; "
                          "unset it, or set RAY_AUTH_MODE=token")  # fmt: skip


@contextmanager
def shown_progress(config: RunConfig) -> Iterator[None]:
    """Print the run's events as lines while it goes on. The workers' own output stays in Ray's logs."""
    run_dir, tail = config.run_dir, EventTail(config.run_dir, skip=True)

    def follow(over: threading.Event) -> None:
        total = None
        while True:
            last = over.is_set()
            for event in tail.new():
                total = event.get("total_steps", total)
                if event["event"] != "step" or event["step"] % config.train.logging_steps == 0:
                    print(event_line(event, total), flush=True)
            if last:
                return
            over.wait(1.0 if storage.is_local(run_dir) else 5.0)

    with beside(follow):
        yield


def refuse_lost_storage(config: RunConfig) -> None:
    """Raise ConfigError where a Ray job would write its run into Ray's copy of the working directory, which is deleted with the job."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and storage.is_local(config.storage) and not Path(config.storage).expanduser().is_absolute():
        raise ConfigError(f"storage = {config.storage!r} in a submitted job is a folder of its temporary working directory; "
                          "expected an absolute path that all boxes share, or s3://bucket/runs")  # fmt: skip


def with_fixed_batch(config: RunConfig) -> RunConfig:
    """The run with its global batch spelt out. A run that began keeps the one it has, whatever the number of workers now."""
    stored = storage.join(config.run_dir, "config.yaml")
    fixed: dict[str, Any] = {"global_batch": config.global_batch, "gradient_accumulation_steps": 1}
    if storage.exists(stored):
        kept = load_config(stored)
        if config.train.global_batch is None:
            fixed["global_batch"] = kept.global_batch
        if config.engine.name == "auto":  # and the size of a micro-batch that was chosen then
            fixed |= {"global_batch": kept.global_batch, "per_device_train_batch_size": kept.train.per_device_train_batch_size}
    config = config.model_copy(update={"train": config.train.model_copy(update=fixed)})
    check_run(config)
    return config


def prepare_data(config: RunConfig) -> tuple[RunConfig, Folders]:
    """Shards, the offline model where one is asked for, and the indexes; each is made once and found again."""
    if not config.data.train:
        raise ConfigError("data.train is not set; expected a path, URI or hub data set id with training data")
    prepare_run(config)
    folders = Folders(shard_folder(config, "train"), shard_folder(config, "validation") if config.data.validation else "")
    # From here on the run names its shards: a source that has moved or changed does not touch a run that has begun.
    config = config.model_copy(update={"data": config.data.model_copy(update={"train": folders.train, "validation": folders.validation})})
    config = with_offline_model(config, folders.train)
    for folder in (folders.train, folders.validation):
        if folder:
            ensure_index(folder, config)
    # What is read with the shards, made once as well; evaluation asks no reference model.
    folders = replace(folders, sidecars=ensure_sidecars(folders.train, config))
    if folders.validation:
        folders = replace(folders, validation_sidecars=ensure_sidecars(folders.validation, config, reference=False))
    return config, folders


def with_offline_model(config: RunConfig, train_folder: str) -> RunConfig:
    """For model.path = tiny or random-*: write that model once, its tokenizer trained on the data set's text, and point the run at it."""
    shape = config.model.path
    if shape not in SHAPES:
        return config
    manifest = read_manifest(train_folder)
    target = storage.join(config.storage, "models", f"{shape}-{manifest.fingerprint}-{config.seed}")
    if not storage.exists(storage.join(target, "config.json")):
        few = replace(manifest, files=manifest.files[:TEXT_SHARDS])
        texts = distinct_texts(map_shards(train_folder, few, count_answers, config.data.num_cpus_per_task))
        with tempfile.TemporaryDirectory() as local:
            build_model(shape, texts, local, config.seed)
            for file in sorted(Path(local).iterdir(), key=lambda f: f.name == "config.json"):  # the file that is looked for comes last
                storage.write_bytes(storage.join(target, file.name), file.read_bytes())
    return config.model_copy(update={"model": config.model.model_copy(update={"path": target})})


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Local paths made absolute: a worker's current folder is not the driver's."""
    data = config.data.model_copy(update={k: _absolute(getattr(config.data, k)) for k in ("train", "validation", "shards")})
    model = config.model.model_copy(update={"path": _absolute(config.model.path)})
    return config.model_copy(update={"storage": storage.absolute(config.storage), "data": data, "model": model})


def _absolute(path: str) -> str:
    """Only what exists on this machine is a path: a bare name may be a hub id."""
    return storage.absolute(path) if path and storage.is_local(path) and Path(path).expanduser().exists() else path


def fit_planned(config: RunConfig, folders: Folders, begun: bool) -> dict[str, Any]:
    """`engine: auto`: look at the cards, plan, train; where a worker is lost, all of it again with those that are left.

    `begun`: the run has trained before and keeps the size of its steps. Raises auto.NothingFitsError, and the workers' error when max_failures are used up.
    """
    lost, after, statistics = 0, "", DataStatistics.from_index(load_index(folders.train, config))
    while True:
        seen = Survey.from_json(fit(config, folders, {"survey": True}))
        chosen = auto.choose(config, statistics, seen, begun)
        config, begun = chosen.kept, True
        storage.write_bytes(storage.join(config.run_dir, "config.yaml"), to_yaml(config).encode())
        log = EventLog(config.run_dir)
        log.write("plan", **chosen.told, after=after)
        log.flush()
        try:
            return fit(chosen.run, folders, nodes=chosen.nodes)
        except TrainingFailedError as error:
            lost, after = lost + 1, f"{type(error).__name__}: {error}".splitlines()[0][:300]
            if 0 <= config.resources.max_failures < lost:
                raise


def look(config: RunConfig) -> Survey:
    """The cards of the cluster, as many as there may be workers."""
    most = most_workers(config, ray.cluster_resources())
    everywhere = with_settings(with_absolute_paths(config), {"resources.num_workers": (1, most)})
    return Survey.from_json(fit(everywhere, Folders(""), {"survey": True}))


def fit(config: RunConfig, folders: Folders, extra: dict[str, Any] | None = None, nodes: Sequence[str] = ()) -> dict[str, Any]:
    """Run the workers under Ray Train and return rank 0's record. Ray keeps only its own notes: checkpoints are ours, nothing is uploaded twice.

    `nodes`: the id of the node of each worker; a group that was placed so is not started again by itself.
    """
    resources, available = config.resources, ray.cluster_resources()
    gpu = use_gpu(config, available)
    each: dict[str, float] = {"CPU": resources.cpus_per_worker} | ({"GPU": resources.gpus_per_worker} if gpu else {})
    low, high = resources.workers
    # Ray's stubs still describe Train v1, hence the untyped settings.
    scaling: dict[str, Any] = {"num_workers": high if low == high else (low, high), "use_gpu": gpu, "resources_per_worker": each}
    scaling["elastic_resize_monitor_interval_s"] = NEVER
    if nodes:
        scaling["label_selector"] = [{**resources.label_selector, "ray.io/node-id": node} for node in nodes]
    elif resources.label_selector:
        scaling["label_selector"] = resources.label_selector
    # How long Ray Train waits for room for a group before it counts the boxes again: one that was just lost may still be counted.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "5")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process more in every group, whose notices nobody reads: `cluster drain` stops runs
    notes, path = storage.filesystem(storage.join(config.storage, ".ray"))  # Ray's own reading of a URI knows no AWS_ENDPOINT_URL
    function: Any = train_function
    failures: dict[str, Any] = {"max_failures": 0, "controller_failure_limit": 1} if nodes else {"max_failures": resources.max_failures}
    growth = Growth(config, each)
    while True:
        run = TrainRunConfig(
            name=f"{config.name}-{int(time.time())}", storage_path=path, storage_filesystem=notes,
            failure_config=FailureConfig(**failures),
        )  # fmt: skip
        trainer = TorchTrainer(
            function, train_loop_config=worker_settings(config, folders, extra), torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
            scaling_config=ScalingConfig(**scaling), run_config=run,
        )  # fmt: skip
        with growth.watching():
            result: Any = trainer.fit()
        if result.return_value.get("status") != RESIZED:
            return result.return_value


def worker_settings(config: RunConfig, folders: Folders, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the workers are told, in plain values: unpickled, one of our classes would import torch and more, in the controller as well."""
    return {"config": config.model_dump(mode="json"), "folders": asdict(folders)} | (extra or {})


def finish(config: RunConfig, folders: Folders, record: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Add what the driver knows, and write result.json and the report."""
    history = surviving(read_events(config.run_dir))
    steps = [e for e in history if e["event"] == "step"]
    trained = sum(e["seconds"] for e in steps)
    result = {
        "name": config.name, **record, "seconds": round(seconds, 1), "train_seconds": round(trained, 1),
        "data_wait_share": round(sum(e["data_wait_seconds"] for e in steps) / trained, 4) if trained else None,
        "samples_per_second": round(sum(e["samples"] for e in steps) / trained, 1) if trained else None,
        "peak_memory_bytes": max((e["memory_bytes"] for e in steps), default=0), "final_loss": steps[-1]["loss"] if steps else None,
        "versions": _start(history).get("versions", {}),
    }  # fmt: skip
    if record["accuracy"] and config.method != "retrieval":  # a search has no answer that the question alone could give away
        training = map_shards(folders.train, read_manifest(folders.train), count_answers, config.data.num_cpus_per_task)
        step = max(e["step"] for e in history if e["event"] == "evaluate")
        result["blind_baseline"] = round(blind_baseline(training, read_predictions(config.run_dir, step)), 4)
    storage.write_bytes(storage.join(config.run_dir, "result.json"), json.dumps(result, indent=1).encode())
    write_report(config.run_dir, report_images(config, folders))
    return result


def report_images(config: RunConfig, folders: Folders) -> dict[str, bytes]:
    """A few validation images by row key, whose predictions the report shows."""
    if not folders.validation:
        return {}
    reader = ShardReader(folders.validation, tuple(f.name for f in read_manifest(folders.validation).files))
    images: dict[str, bytes] = {}
    for row_group in range(reader.row_groups(0)):
        images |= {row.key: row.images[0] for row in reader.row_group(0, row_group) if row.images}
        if len(images) >= config.evaluate.samples_in_report:
            break
    return dict(list(images.items())[: config.evaluate.samples_in_report])


def evaluate_run(config: RunConfig, name: str | None = None) -> dict[str, Any]:
    """Decode the validation shards of a run with one of its checkpoints (default: the best, else the newest), over its workers."""
    connect()
    config = auto.bounded(with_absolute_paths(config))
    if not config.data.validation:
        raise ConfigError("data.validation is not set: there is nothing to evaluate on")
    chosen = chosen_checkpoint(config.run_dir, name)
    check_resources(config, ray.cluster_resources())
    ensure_index(config.data.validation, config)
    features = Sidecars(found_features(config.data.validation, config))
    folders = Folders(config.data.train, config.data.validation, validation_sidecars=features)
    return fit(config, folders, {"evaluate": chosen.uri})


def _start(history: list[Event]) -> Event:
    return next((e for e in reversed(history) if e["event"] == "start"), {})
