"""Searches that take minutes: what ASHA and Optuna save, weights that pass from trial to trial, and a driver that is
killed.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from smolray import storage
from smolray.config import load_config, to_yaml
from smolray.run import checkpoint
from smolray.run.events import read_events
from smolray.tune.log import FILE, read_trials
from smolray.tune.run import search_run
from tests.cluster.test_train import train_workers
from tests.cluster.test_tune import assert_nothing_left, folder_of
from tests.cluster.test_tune import make_search as make_search

RATES = {"optimizer.learning_rate": {"loguniform": [1e-6, 1e-2]}, "optimizer.warmup_ratio": {"uniform": [0.0, 0.3]}}


@pytest.fixture(scope="module")
def easy_search(ray_cluster, easy_vqa, tmp_path_factory):
    """easy_search(name, **search) -> RunConfig: up to six epochs of 6,000 questions of easy-vqa from random weights."""
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("easy_search")
    for split, rows in (("train", 6000), ("test", 1000)):
        pq.write_table(
            pq.read_table(easy_vqa / f"{split}.parquet").slice(0, rows),
            folder / f"{split}.parquet",
            row_group_size=1000,
        )

    def make(name, **search):
        return load_config(
            None,
            [
                f"name={name}",
                f"storage={folder}/runs",
                f"data.train={folder}/train.parquet",
                f"data.validation={folder}/test.parquet",
                "model.path=tiny",
                "model.dtype=float32",
                "engine.stage=0",
                "data.max_length=1024",
                "data.max_questions_per_image=32",
                "train.per_device_train_batch_size=64",
                "train.num_train_epochs=6",
                "evaluate.max_new_tokens=3",
                "evaluate.batch_size=256",
                "checkpoint.save_steps=0",
                "checkpoint.save_total_limit=1",
                "resources.use_gpu=no",
                "resources.cpus_per_worker=0.5",
            ],
            {"search": {"space": RATES, "max_concurrent": 2, **search}},
        )

    return make


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_asha_with_optuna_finds_better_settings_in_fewer_steps(easy_search):
    began = time.monotonic()
    config = easy_search("asha-optuna", num_samples=12, algorithm="optuna", scheduler="asha", reduction_factor=3)
    result = search_run(config)
    seconds = time.monotonic() - began
    trials = read_trials(folder_of(config))
    full = max(t.steps for t in trials)
    share = sum(t.steps for t in trials) / (len(trials) * full)
    random = easy_search("random", num_samples=3, algorithm="random", scheduler="none")
    search_run(random)
    drawn = sorted(t.value("accuracy") for t in read_trials(folder_of(random)))
    print(
        f"\n12 trials in {seconds:.0f} s, {share:.0%} of the steps; best {result['best']['accuracy']:.3f}, random "
        f"trials {drawn}"
    )
    assert len(trials) == 12 and all(t.ended for t in trials)
    assert share < 0.6
    assert result["best"]["accuracy"] > drawn[1], "no better than the median random trial"
    assert seconds < 12 * 60
    assert_nothing_left()


@pytest.mark.slow
def test_a_trial_that_exploits_another_begins_with_its_weights(make_search):
    space = {"optimizer.learning_rate": {"grid": [3e-3, 1e-6]}}
    # which a rate of 1e-6 does not lower by luck
    search = {"algorithm": "random", "scheduler": "pbt", "num_samples": 1, "metric": "loss"}
    config = make_search("population", space, search, "train.num_train_epochs=5", "checkpoint.save_total_limit=9")
    search_run(config)
    exploits = [(t, e) for t in read_trials(folder_of(config)) for e in t.exploits]
    assert exploits, "nobody took over the better weights"
    trial, event = exploits[0]
    assert trial.number == 2 and event["run"] == "population-2-g2" and "/population-1/" in event["origin"]
    run_dir = storage.join(config.storage, event["run"])
    copied = json.loads(storage.read_bytes(storage.join(run_dir, "origin.json")))
    source = json.loads(storage.read_bytes(storage.join(event["origin"], checkpoint.MANIFEST)))
    assert event["hash"] == copied["hash"] == source["files"]["weights.safetensors"]["blake2b"]
    steps = [e for e in read_events(run_dir) if e["event"] == "step"]
    assert steps[0]["step"] == copied["step"] + 1, "it continues where the other trial was"
    started = next(e for e in read_events(run_dir) if e["event"] == "start")
    assert (
        started["config"]["optimizer"]["learning_rate"]
        == copied["settings"]["optimizer.learning_rate"]
        == event["settings"]["optimizer.learning_rate"]
    )
    taken_over = next(
        e
        for e in read_events(storage.join(config.storage, "population-1"))
        if e["event"] == "step" and e["step"] == copied["step"]
    )
    bad = [e for e in read_events(storage.join(config.storage, "population-2")) if e["event"] == "step"][-1]
    assert abs(steps[0]["loss"] - taken_over["loss"]) < 0.5 * abs(bad["loss"] - taken_over["loss"])
    assert_nothing_left()


@pytest.mark.faults
def test_a_search_whose_driver_is_killed_repeats_nothing(make_search, tmp_path):
    space = {"optimizer.learning_rate": {"choice": [1e-3, 2e-3, 3e-3]}}
    config = make_search(
        "killed",
        space,
        {"algorithm": "grid", "scheduler": "none"},
        "train.num_train_epochs=3",
        "checkpoint.save_steps=5",
    )
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    code = (
        "from smolray.config import load_config; from smolray.tune.run import search_run; "
        f"search_run(load_config({str(tmp_path / 'run.yaml')!r}))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL)

    def stand():
        trials = read_trials(folder_of(config))
        third = checkpoint.list_steps(storage.join(config.storage, "killed-3"))
        return any(t.ended for t in trials) and bool(third)

    deadline = time.monotonic() + 500
    while not stand():
        assert process.poll() is None and time.monotonic() < deadline, "the search ended before it could be killed"
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(5)  # Ray's own processes follow their driver
    before = {t.number: t for t in read_trials(folder_of(config))}
    starts = {
        n: sum(e["event"] == "start" for e in read_events(storage.join(config.storage, t.run)))
        for n, t in before.items()
    }
    ended = [n for n, t in before.items() if t.ended]
    assert ended and len(ended) < 3
    result = search_run(config)
    trials = {t.number: t for t in read_trials(folder_of(config))}
    assert result["trials"] == 3 and all(t.status == "finished" for t in trials.values())
    for number, trial in trials.items():
        events = read_events(storage.join(config.storage, trial.run))
        again = sum(e["event"] == "start" for e in events) - starts.get(number, 0)
        assert again == (0 if number in ended else 1), (
            f"trial {number} was {'repeated' if number in ended else 'not gone on with'}"
        )
        assert [r["report"] for r in trial.reports] == [1, 2, 3], "the history is whole, and nothing stands in it twice"
    resumed = [e["step"] for e in read_events(storage.join(config.storage, "killed-3")) if e["event"] == "resume"]
    assert resumed and resumed[0] >= 5, "it began anew instead of at its checkpoint"
    log = read_events(folder_of(config), FILE)
    assert len([e for e in log if e["event"] == "trial"]) == 3 and len([e for e in log if e["event"] == "end"]) == 3


@pytest.mark.faults
def test_a_trial_whose_worker_is_killed_resumes_from_its_checkpoint(make_search):
    space = {"optimizer.learning_rate": {"choice": [1e-3, 2e-3]}}
    settings = ("train.num_train_epochs=3", "checkpoint.save_steps=5", "resources.max_failures=2")
    config, killed = make_search("wounded", space, {"algorithm": "grid", "scheduler": "none"}, *settings), []

    def kill():
        while not all(checkpoint.list_steps(storage.join(config.storage, f"wounded-{n}")) for n in (1, 2)):
            time.sleep(0.05)
        killed.append(train_workers()[0].pid)
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    search_run(config)
    assert killed
    trials = read_trials(folder_of(config))
    assert [t.status for t in trials] == ["finished"] * 2
    assert [[r["report"] for r in t.reports] for t in trials] == [[1, 2, 3]] * 2
    resumed = [
        [e["step"] for e in read_events(storage.join(config.storage, t.run)) if e["event"] == "resume"] for t in trials
    ]
    assert sorted(map(len, resumed)) == [0, 1], "the other trial did not notice"
    assert max(resumed)[0] >= 5
    assert_nothing_left()
