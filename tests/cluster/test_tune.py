"""Searches through Ray Tune and Ray Train: trials are ordinary runs, nothing is left behind, a name resumes."""

import threading
import time

import psutil
import pytest
import ray
import yaml
from typer.testing import CliRunner

from smolray import storage
from smolray.cli.app import app
from smolray.config import ConfigError, load_config
from smolray.launch.driver import launch_run
from smolray.run.events import read_events, surviving
from smolray.run.status import run_status
from smolray.tune.log import FILE, read_trials, search_folder
from smolray.tune.run import search_run


@pytest.fixture
def make_search(ray_cluster, small_vqa, tmp_path_factory):
    """make_search(name, space, search, *overrides) -> RunConfig with a search section; trials of one worker, 24 steps
    at most.
    """
    base = tmp_path_factory.getbasetemp() / "searches"

    def make(name, space, search, *overrides):
        return load_config(
            None,
            [
                f"name={name}",
                f"storage={base}",
                f"data.train={small_vqa}/train.parquet",
                f"data.validation={small_vqa}/test.parquet",
                "model.path=tiny",
                "model.dtype=float32",
                "engine.stage=0",
                "optimizer.learning_rate=1e-3",
                "data.max_length=1024",
                "train.per_device_train_batch_size=32",
                "train.num_train_epochs=2",
                "evaluate.max_samples=64",
                "evaluate.max_new_tokens=3",
                "resources.use_gpu=no",
                "resources.cpus_per_worker=0.5",
                "checkpoint.save_steps=0",
                *overrides,
            ],
            {"search": {"space": space, "max_concurrent": 2, **search}},
        )

    return make


def folder_of(config):
    return search_folder(config.storage, config.name)


def command_of(process):
    """Empty where it has ended meanwhile."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def assert_nothing_left():
    """No actor and no placement group of a trial outlives the search; Ray needs a moment to take them down."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        names = [command_of(p) for p in psutil.Process().children(recursive=True)]
        actors = [
            n
            for n in names
            if any(kind in n for kind in ("Trainable", "TrainController", "RayTrainWorker", "PlacementGroupCleaner"))
        ]
        groups = [g for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"]
        free = ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]
        if not actors and not groups and free:
            return
        time.sleep(1)
    raise AssertionError(f"left behind: {actors}, {groups}, {ray.available_resources()}")


def losses(storage_uri, name):
    return {
        e["step"]: e["loss"] for e in surviving(read_events(storage.join(storage_uri, name))) if e["event"] == "step"
    }


@pytest.mark.slow
def test_a_search_runs_its_trials_once_and_leaves_nothing_behind(make_search):
    space = {"optimizer.learning_rate": {"choice": [3e-3, 1e30, 1e-6]}}
    config = make_search("small", space, {"algorithm": "grid", "scheduler": "asha", "reduction_factor": 2})
    result = search_run(config)
    trials = read_trials(folder_of(config))
    assert [t.settings["optimizer.learning_rate"] for t in trials] == [3e-3, 1e30, 1e-6]
    assert trials[0].status == "finished" and trials[2].status in ("finished", "stopped")
    assert trials[1].status == "failed" and "non-finite loss" in trials[1].reason, "the search went on without it"
    assert result["best"]["number"] == 1 and list(result["failed"]) == [2]
    assert storage.exists(storage.join(folder_of(config), "report.html"))
    assert_nothing_left()
    # best.yaml is a run that jobs/train.py takes, and it repeats its trial.
    best = load_config(result["best"]["config"])
    assert best.name == "small-best-1" and best.search is None
    launch_run(best)
    first, again = losses(config.storage, result["best"]["run"]), losses(config.storage, "small-best-1")
    assert all(abs(first[step] - again[step]) < 1e-5 for step in first) and first
    # The same name again: everything is known.
    before = read_events(folder_of(config), FILE)
    assert search_run(config)["best"] == result["best"]
    assert [e["event"] for e in read_events(folder_of(config), FILE)[len(before) :]] == ["start", "over"]


@pytest.mark.slow
def test_a_stopped_search_frees_everything_and_resumes_where_it_was(make_search):
    space = {"optimizer.learning_rate": {"choice": [3e-3, 2e-3, 1e-3]}}
    config = make_search("halted", space, {"algorithm": "grid", "scheduler": "none"}, "train.num_train_epochs=6")

    def stop():
        while not any(t.reports for t in read_trials(folder_of(config))):
            time.sleep(0.2)
        commands = CliRunner().invoke(app, ["stop", "halted", "--storage", config.storage])
        said.append((commands.exit_code, commands.output))

    said: list[tuple[int, str]] = []
    thread = threading.Thread(target=stop)
    thread.start()
    search_run(config)
    thread.join()
    assert_nothing_left()
    assert said[0][0] == 0 and "stopped" in said[0][1], said
    open_trials = [t for t in read_trials(folder_of(config)) if not t.ended]
    assert open_trials and len(read_trials(folder_of(config))) < 3, "a trial began after the search was to stop"
    stood = {t.run: run_status(storage.join(config.storage, t.run)).step for t in open_trials}
    search_run(config)
    assert [t.status for t in read_trials(folder_of(config))] == ["finished"] * 3
    for run, step in stood.items():
        assert [e["step"] for e in read_events(storage.join(config.storage, run)) if e["event"] == "resume"] == [step]


def test_another_search_under_the_same_name_is_refused(make_search):
    space = {"optimizer.learning_rate": {"choice": [3e-3, 1e-3]}}
    config = make_search("refused", space, {"algorithm": "grid"})
    storage.write_bytes(
        storage.join(folder_of(config), "search.yaml"), yaml.safe_dump(config.model_dump(mode="json")).encode()
    )
    with pytest.raises(ConfigError, match=r"train\.num_train_epochs"):
        search_run(make_search("refused", space, {"algorithm": "grid"}, "train.num_train_epochs=3"))
