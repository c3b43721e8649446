"""Whole runs of jobs/train.py whose storage, shards and model lie in a real S3 server: the machine keeps nothing that
the run needs.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from jobs.easyvqa import export_easy_vqa
from smolray import storage
from smolray.run import checkpoint
from smolray.run.events import read_events, surviving
from smolray.run.status import list_runs
from smolray.train.audit import consumed
from smolray.tune.log import read_trials
from tests.s3 import KEYS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
QUESTIONS = 240
SETTINGS = [
    "model.path=tiny",
    "model.dtype=float32",
    "data.max_length=1024",
    "data.shards=s3://bucket/run-shards",
    "train.per_device_train_batch_size=8",
    "train.global_batch=2",
    "train.num_train_epochs=2",
    "train.audit=true",
    "optimizer.learning_rate=1e-3",
    "checkpoint.save_steps=5",
    "evaluate.eval_epochs=0",
    "evaluate.max_samples=16",
    "evaluate.max_new_tokens=3",
    "resources.num_workers=2",
    "resources.cpus_per_worker=0.5",
    "resources.use_gpu=no",
]


@contextmanager
def started(*command):
    """A command on a machine of its own: no Ray address, no temporary files of others; the AWS environment of
    `s3_server`.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SMOLRAY_"))}
    with tempfile.TemporaryDirectory(prefix="s3", ignore_cleanup_errors=True) as folder:
        environment = kept | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": folder, "TMPDIR": folder, "COLUMNS": "160"}
        environment["RAY_worker_niceness"] = "0"  # or on a busy machine Ray's workers wait for all else
        # a background job of a shell is deaf to Ctrl-C, and so are its children
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        with subprocess.Popen(
            [sys.executable, *command],
            env=environment,
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=heard,
        ) as process:
            yield process


def run(*command):
    """What a command prints."""
    with started(*command) as process:
        printed, _ = process.communicate(timeout=500)
    assert process.returncode == 0, printed[-5000:]
    return printed


def train(*arguments):
    return run("jobs/train.py", *arguments)


def smolray(*arguments):
    return run("-m", "smolray", *arguments, "--storage", "s3://bucket/runs")


@pytest.fixture(scope="module")
def launched(s3_server, tmp_path_factory):
    """(run folder, what was printed) of a run of 6 steps.

    After it the source is gone, and so are the temporary files of its machine.
    """
    raw, name = tmp_path_factory.mktemp("raw"), f"run-{uuid.uuid4().hex[:6]}"
    export_easy_vqa(raw, limit=QUESTIONS)
    given = [
        f"name={name}",
        "storage=s3://bucket/runs",
        f"data.train={raw}/train.parquet",
        f"data.validation={raw}/test.parquet",
    ]
    printed = train("train.max_steps=6", *SETTINGS, *given)
    shutil.rmtree(raw)
    return f"s3://bucket/runs/{name}", printed


def test_a_run_on_s3_leaves_there_all_that_a_run_leaves(launched):
    run_dir, printed = launched
    for name in ("config.yaml", "events", "result.json", "report.html", "predictions", "audit"):
        assert storage.exists(storage.join(run_dir, name)), name
    result = json.loads(storage.read_bytes(storage.join(run_dir, "result.json")))
    skipped: list[str] = []
    newest = checkpoint.latest(run_dir, skipped.append)
    assert not skipped and newest is not None and newest.step == result["steps"] == 6
    assert checkpoint.list_steps(run_dir) == [5, 6]
    assert result["status"] == "finished" and 0 <= result["accuracy"]["overall"] <= 1
    assert "finished at step 6" in printed
    model = [info.path for info in storage.list_files("s3://bucket/runs/models", recursive=True)]
    assert any(path.endswith("model.safetensors") for path in model), (
        "the offline model is kept in the storage of the run"
    )
    assert storage.exists("s3://bucket/run-shards/train/manifest.json")


def test_credentials_stand_nowhere_in_what_a_run_on_s3_writes(launched):
    run_dir, printed = launched
    files = [*storage.list_files(run_dir, recursive=True), *storage.list_files("s3://bucket/runs/.ray", recursive=True)]
    assert len(files) > 10
    contents = {info.path: storage.read_bytes(f"s3://{info.path}") for info in files} | {"stdout": printed.encode()}
    for name, content in contents.items():
        assert KEYS["AWS_SECRET_ACCESS_KEY"].encode() not in content, name
        assert KEYS["AWS_ACCESS_KEY_ID"].encode() not in content, name


def test_status_and_logs_read_a_run_on_s3(launched):
    run_dir, _ = launched
    [told] = [s for s in list_runs("s3://bucket/runs") if s.run_dir == run_dir]
    assert (told.state, told.step, told.total_steps) == ("finished", 6, 6)
    name = run_dir.rsplit("/", 1)[1]
    assert "finished" in smolray("status", name)
    steps = [line for line in smolray("logs", name).splitlines() if line.startswith("step")]
    assert len(steps) == 6


@pytest.mark.slow
def test_a_run_on_s3_resumes_by_name_and_sees_every_sample_once(launched):
    run_dir, _ = launched
    before = len(read_events(run_dir))
    train("--config", f"{run_dir}/config.yaml", "train.max_steps=-1")
    events = read_events(run_dir)
    total = events[-1]["step"]
    assert total > 20 and checkpoint.latest(run_dir).step == total
    told = [(e["event"], e["step"]) for e in events[before:] if e["event"] in ("resume", "end")]
    assert told == [("resume", 6), ("end", total)]
    assert [e["step"] for e in surviving(events) if e["event"] == "step"] == list(range(1, total + 1))
    history = consumed(run_dir)
    assert sorted(history) == [0, 1]
    for rows in history.values():
        assert Counter(i for _, i in rows) == Counter(f"train-{i}" for i in range(QUESTIONS))


def test_a_search_on_s3_saves_and_stops_at_ctrl_c_and_resumes(s3_server, tmp_path):
    export_easy_vqa(tmp_path, limit=QUESTIONS)
    name = f"search-{uuid.uuid4().hex[:6]}"
    search = {
        "space": {"optimizer.learning_rate": {"choice": [1e-3, 2e-3]}},
        "algorithm": "grid",
        "scheduler": "none",
        "max_concurrent": 1,
    }
    (tmp_path / "search.yaml").write_text(json.dumps({"search": search}))
    given = [
        f"name={name}",
        "storage=s3://bucket/runs",
        f"data.train={tmp_path}/train.parquet",
        f"data.validation={tmp_path}/test.parquet",
    ]
    command = [
        "jobs/tune.py",
        "--config",
        str(tmp_path / "search.yaml"),
        *SETTINGS,
        *given,
        f"data.shards=s3://bucket/{name}-shards",  # those of the run are of another source
        "evaluate.eval_epochs=1",
        "train.num_train_epochs=3",
    ]
    folder, first = f"s3://bucket/runs/{name}", f"s3://bucket/runs/{name}-1"
    with started(*command) as process:
        deadline = time.monotonic() + 300
        while not any(e["event"] == "step" for e in read_events(first)):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][-3000:]
            time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=200)
    assert "its trials have saved" in printed and process.returncode == 130
    stopped = read_events(first)[-1]
    assert (stopped["event"], stopped["status"]) == ("end", "stopped") and checkpoint.latest(first).step == stopped[
        "step"
    ]
    assert not any(t.ended for t in read_trials(folder))

    run(*command)
    assert [t.status for t in read_trials(folder)] == ["finished"] * 2
    assert [e["step"] for e in read_events(first) if e["event"] == "resume"] == [stopped["step"]]
    for left in ("best.yaml", "result.json", "report.html", "trials"):
        assert storage.exists(storage.join(folder, left)), left
