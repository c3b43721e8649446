"""Whole runs through Ray Data and Ray Train: each sample once whatever happens, and the same loss curve."""

import io
import os
import signal
import threading
import time
from collections import Counter

import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from smolray import storage
from smolray.config import load_config
from smolray.data.reader import ShardReader
from smolray.export import export_run
from smolray.launch.data import prepare_data
from smolray.launch.driver import evaluate_run, launch_run
from smolray.launch.resolve import with_absolute_paths
from smolray.run import checkpoint
from smolray.run.events import read_events, surviving
from smolray.run.status import request_stop
from smolray.train.audit import consumed


def losses(config):
    """Step -> loss of the surviving history."""
    return {e["step"]: e["loss"] for e in surviving(read_events(config.run_dir)) if e["event"] == "step"}


def training_ids(config):
    _, folders, _ = prepare_data(with_absolute_paths(config))
    return sorted(c.id for row in ShardReader.open(folders.train).rows() for c in row.conversations)


def assert_every_sample_once(config):
    history = consumed(config.run_dir)
    assert sorted(history) == list(range(config.train.num_train_epochs))
    for epoch, rows in history.items():
        twice = [i for i, n in Counter(i for _, i in rows).items() if n > 1]
        assert not twice, f"epoch {epoch}: {len(twice)} samples more than once, such as {twice[:3]}"
        assert sorted(i for _, i in rows) == training_ids(config), f"epoch {epoch}"


def assert_same_curve(config, reference, tolerance=1e-5):
    got = losses(config)
    assert got.keys() == reference.keys()
    worst = max(abs(got[step] - reference[step]) for step in reference)
    assert worst <= tolerance, f"losses differ by up to {worst}"


def when_step(config, step, action):
    """Call `action` from a thread once the run's log has reached `step` in its newest attempt."""

    def wait():
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            if any(e["event"] == "step" and e["step"] >= step for e in read_events(config.run_dir)):
                action()
                return
            time.sleep(0.05)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def train_workers():
    """Of this session's Ray: another one may run on this machine."""
    mine = {p.pid for p in psutil.Process().children(recursive=True)}
    found = psutil.process_iter(["cmdline"])  # leaves out what ends meanwhile
    return [p for p in found if p.pid in mine and any("RayTrainWorker" in part for part in p.info["cmdline"] or ())]


def launched_with_a_killed_worker(config, which):
    """The result of a run whose worker number `which` is killed at step 14: it is started again by itself."""
    killed = []

    def kill():
        victim = train_workers()[which]
        killed.append(victim.pid)
        os.kill(victim.pid, signal.SIGKILL)

    thread = when_step(config, 14, kill)
    result = launch_run(config)
    thread.join(timeout=5)
    assert killed, "no worker was there to kill"
    assert [e["attempt"] for e in read_events(config.run_dir) if e["event"] == "start"] == [1, 2], (
        "the run was not started again"
    )
    return result


@pytest.fixture(scope="module")
def reference(ray_cluster, small_vqa, tmp_path_factory):
    """The uninterrupted run on two workers: (config, result, losses by step)."""
    from tests.cluster.conftest import make_run

    config = make_run.__wrapped__(ray_cluster, small_vqa, tmp_path_factory)("reference")
    result = launch_run(config)
    return config, result, losses(config)


def test_a_run_trains_evaluates_and_reports(reference):
    config, result, curve = reference
    assert result["status"] == "finished" and result["steps"] == len(curve)
    assert curve[max(curve)] < 0.5 * curve[1]
    assert result["accuracy_counts"]["overall"] > 32 and 0 <= result["accuracy"]["overall"] <= 1
    assert 0 < result["blind_baseline"] < 1
    for name in ("result.json", "report.html", "events.jsonl", "config.yaml", "predictions"):
        assert storage.exists(storage.join(config.run_dir, name)), name
    assert all("MapBatches" in worker["ray_data"] for worker in result["workers"]), (
        "Ray Data's own statistics of each worker"
    )
    assert_every_sample_once(config)


@pytest.mark.slow  # tests/recipes/test_parity.py holds it in every make test
def test_one_worker_gives_the_curve_of_two(make_run, reference):
    config = make_run("one-worker", "resources.num_workers=1", "engine.stage=0", "train.global_batch=3")
    launch_run(config)
    assert_same_curve(config, reference[2])
    assert_every_sample_once(config)


def stopped_at(config, step, launch=launch_run):
    """The step at which the run was stopped and saved, once it had reached `step`."""
    thread = when_step(config, step, lambda: request_stop(config.run_dir))
    stopped = launch(config)
    thread.join(timeout=5)
    assert stopped["status"] == "stopped"
    saved = checkpoint.latest(config.run_dir)
    assert saved is not None and saved.step == stopped["steps"]
    return saved.step


def test_a_killed_then_stopped_run_resumes_with_other_workers_and_stage(make_run, reference):
    """Killed in the middle of an epoch, it goes on with the workers that are left."""
    config = make_run("killed", "resources.num_workers=[1,2]")
    stopped = stopped_at(config, 22, lambda config: launched_with_a_killed_worker(config, 0))
    assert 22 <= stopped < len(reference[2])
    assert launch_run(make_run("killed", "resources.num_workers=1", "engine.stage=3"))["status"] == "finished"
    assert_same_curve(config, reference[2])
    assert_every_sample_once(config)


@pytest.mark.slow
def test_a_run_stopped_on_one_worker_in_its_second_epoch_resumes_on_two(make_run, reference):
    config = make_run("stopped-late", "resources.num_workers=1", "engine.stage=3")
    assert len(reference[2]) // 2 < stopped_at(config, len(reference[2]) // 2 + 3) < len(reference[2])
    assert launch_run(make_run("stopped-late"))["status"] == "finished"
    assert_same_curve(config, reference[2])
    assert_every_sample_once(config)


def test_a_finished_run_is_not_trained_again(make_run, reference):
    run_dir = reference[0].run_dir
    before = read_events(run_dir)
    assert launch_run(make_run("reference")) == reference[1]
    assert read_events(run_dir) == before, "not even workers were started"


@pytest.mark.slow
def test_the_workers_of_a_driver_that_died_before_its_result_find_nothing_to_do(make_run, reference):
    run_dir = reference[0].run_dir
    before = read_events(run_dir)
    storage.delete(storage.join(run_dir, "result.json"))
    result = launch_run(make_run("reference"))
    assert result["status"] == "finished" and result["accuracy"] == reference[1]["accuracy"]
    assert [e for e in read_events(run_dir) if e["event"] == "step"] == [e for e in before if e["event"] == "step"]


@pytest.mark.slow  # tests/cluster/test_pipeline_run.py holds it in every make test
def test_a_checkpoint_evaluated_again_gives_the_same_accuracy(reference):
    config, result, _ = reference
    stored = load_config(storage.join(config.run_dir, "config.yaml"))
    again = evaluate_run(stored, "latest")
    assert again["accuracy"] == result["accuracy"] and again["step"] == result["steps"]


def test_the_exported_folder_answers_in_transformers_as_in_the_run(reference):
    config, result, _ = reference
    folder = export_run(config.run_dir, name="latest")
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder).eval()
    predictions = pq.read_table(f"{config.run_dir}/predictions/step-{result['steps']:08d}.parquet").to_pylist()[:20]
    stored = load_config(storage.join(config.run_dir, "config.yaml"))
    images = {row.key: row.images[0] for row in ShardReader.open(stored.data.validation).rows()}
    for record in predictions:
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": record["question"]}]}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(text=prompt, images=[Image.open(io.BytesIO(images[record["key"]]))], return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs.input_ids.shape[1] :]
        assert processor.decode(tokens, skip_special_tokens=True).strip() == record["prediction"]
