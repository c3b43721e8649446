"""The command line against a real job server that wants a token: submit, follow, stop, resume.

In most tests the job is a stand-in loop, so that they show the client alone and take seconds; it logs and answers the
stop flag as the real one does. The last ones upload the project and train.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import pytest

from jobs.easyvqa import export_easy_vqa
from smolray.run.events import read_events, surviving
from smolray.train.audit import consumed
from tests.ray_head import ray_head

ROOT = Path(__file__).parents[2]
QUESTIONS = 300
TOKEN = "0123456789abcdef" * 4
SECRET = "a-key-of-the-storage"
REAL = ROOT / "smolray"
# A checkout whose `smolray train` is a loop without a model; its other modules are the real ones.
PACKAGE = f"__path__.append({str(REAL)!r})"
TRAIN = """
import argparse, time
from smolray import storage
from smolray.config import load_config, to_yaml
from smolray.run.events import EventLog
from smolray.run.folder import RunFolder

parser = argparse.ArgumentParser()
parser.add_argument("--config")
arguments, (command, *overrides) = parser.parse_known_args()
assert command == "train"
config = load_config(arguments.config, overrides)
storage.write_bytes(RunFolder(config.run_dir).config, to_yaml(config).encode())
log = EventLog(config.run_dir)
log.write("start", workers=1, total_steps=config.train.max_steps)
for step in range(1, config.train.max_steps + 1):
    log.write("step", step=step, loss=1 / step)
    print("loop at step", step, flush=True)
    if storage.exists(RunFolder(config.run_dir).stop_flag):
        log.write("end", status="stopped", step=step)
        time.sleep(config.seed)  # a job that lingers for so long
        raise SystemExit
    time.sleep(0.1)
log.write("end", status="finished", step=step)
"""


def environment(folder, token=TOKEN):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SMOLRAY_"))}
    extra = {
        "RAY_TMPDIR": folder,
        "RAY_USAGE_STATS_ENABLED": "0",
        "HOME": folder,
        "COLUMNS": "160",
        "AWS_SECRET_ACCESS_KEY": SECRET,
    }
    extra["RAY_worker_niceness"] = "0"  # or on a busy machine Ray's workers wait for all else
    extra |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {}
    return kept | extra | {"PATH": f"{Path(sys.executable).parent}:{kept['PATH']}"}


@pytest.fixture(scope="module")
def head():
    """A head node with a job server of its own; gives its address and a folder for it."""
    with (
        tempfile.TemporaryDirectory(prefix="sj", ignore_cleanup_errors=True) as folder,
        ray_head(sys.executable, folder, environment(folder)) as address,
    ):
        stop = ["stop", "probe", "--storage", folder, "--address", address]
        wait_for(lambda: smolray(folder, *stop).returncode == 0 and takes_jobs(address), folder)
        yield address, folder


def takes_jobs(address):
    """Whether its agent is up too, which starts the jobs."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
    try:
        asked = urllib.request.Request(f"{address}/api/jobs/", b'{"entrypoint": "true"}', headers)
        return urllib.request.urlopen(asked, timeout=20).status == 200
    except urllib.error.HTTPError:
        return False


def wait_for(ready, folder, seconds=90):
    run = Path(folder) / "probe"  # a run that has ended: stopping it only asks the job server
    run.mkdir()
    (run / "events.jsonl").write_text('{"event": "end", "time": 1, "attempt": 1, "status": "finished", "step": 1}\n')
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, (Path(folder) / "head.log").read_text()[-3000:]
        time.sleep(1)


def smolray(folder, *arguments, cwd=None, token=TOKEN):
    command = [sys.executable, "-P", "-m", "smolray", *arguments]  # -P: not the stand-in of a checkout
    return subprocess.run(
        command, env=environment(folder, token), cwd=cwd or folder, capture_output=True, text=True, timeout=400
    )


@pytest.fixture(scope="module")
def checkout(head):
    folder = Path(head[1]) / "checkout"
    (folder / "smolray").mkdir(parents=True)
    (folder / "smolray" / "__init__.py").write_text(PACKAGE)
    (folder / "smolray" / "__main__.py").write_text(TRAIN)
    (folder / "a.yaml").write_text(f"storage: {head[1]}/runs\ntrain: {{max_steps: 5}}\n")
    return folder


def submit(head, checkout, *overrides, token=TOKEN):
    arguments = ["submit", "--address", head[0], "--config", "a.yaml", *overrides]
    return smolray(head[1], *arguments, cwd=checkout, token=token)


ENDPOINTS = [
    ("GET", "/api/jobs/"),
    ("POST", "/api/jobs/"),
    ("GET", "/api/jobs/x"),
    ("DELETE", "/api/jobs/x"),
    ("POST", "/api/jobs/x/stop"),
    ("GET", "/api/jobs/x/logs"),
    ("GET", "/api/jobs/x/logs/tail"),
    ("GET", "/api/packages/gcs/x.zip"),
    ("PUT", "/api/packages/gcs/x.zip"),
    ("GET", "/api/version"),
    ("GET", "/api/v0/nodes"),
    ("GET", "/api/v0/actors"),
    ("GET", "/api/v0/logs"),
    ("GET", "/nodes?view=summary"),
    ("GET", "/api/cluster_status"),
    ("GET", "/logical/actors"),
    ("GET", "/api/serve/applications/"),
    ("PUT", "/api/serve/applications/"),
    ("GET", "/worker/traceback?pid=1"),
    ("GET", "/api/prometheus_health"),
]


@pytest.mark.parametrize("token", [None, "f" * 64], ids=["none", "wrong"])
@pytest.mark.parametrize(("method", "path"), ENDPOINTS, ids=lambda text: text)
def test_a_raw_request_without_the_token_is_refused(head, method, path, token):
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    body = None if method == "GET" else b'{"entrypoint": "id"}'
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(head[0] + path, body, headers, method=method), timeout=20)
    assert refused.value.code == (403 if token else 401)


@pytest.mark.parametrize("token", [None, "f" * 64], ids=["none", "wrong"])
def test_a_job_without_the_token_is_refused(head, checkout, token):
    done = submit(head, checkout, "name=refused", token=token)
    assert done.returncode == 2, done.stderr
    assert "refused the token" in done.stderr
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stderr
    assert not (Path(head[1]) / "runs" / "refused").exists()


def test_a_job_is_followed_to_its_end(head, checkout):
    done = submit(head, checkout, "name=short", "--follow")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("loop")] == [
        f"loop at step {i}" for i in range(1, 6)
    ]
    assert "SUCCEEDED" in done.stdout
    told = smolray(head[1], "status", "short", "--storage", f"{head[1]}/runs").stdout
    assert "finished" in told and "5/5" in told
    listed = urllib.request.urlopen(
        urllib.request.Request(f"{head[0]}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"}), timeout=20
    ).read()
    assert b"name=short" in listed and SECRET.encode() not in listed, (
        "what the submitter's environment holds is not sent along"
    )


def test_a_run_is_submitted_once_stopped_politely_and_resumed_by_name(head, checkout):
    address, folder = head
    first = submit(head, checkout, "name=long", "train.max_steps=2000", "seed=600")
    assert first.returncode == 0, first.stderr
    second = submit(head, checkout, "name=long")
    assert second.returncode == 2
    assert "is being trained by job" in second.stderr
    log = Path(folder) / "runs" / "long" / "events.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and '"step"' in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    stopped = smolray(folder, "stop", "long", "--address", address, "--patience", "2", "--storage", f"{folder}/runs")
    assert stopped.returncode == 0, stopped.stderr
    assert "long stopped at step" in stopped.stdout
    assert stopped.stdout.splitlines()[-1].endswith("stopped"), "the job that lingered was ended"
    assert log.read_text().splitlines()[-1].find('"stopped"') > 0, "it was ended after it had saved"
    arguments = ["resume", "long", "train.max_steps=3", "--follow", "--address", address, "--storage", f"{folder}/runs"]
    resumed = smolray(folder, *arguments, cwd=checkout)
    assert resumed.returncode == 0, resumed.stderr + resumed.stdout
    assert resumed.stdout.count("loop at step") == 3
    assert '"attempt": 2' in log.read_text()


@pytest.fixture(scope="module")
def project(head):
    """The project as a fresh checkout has it: what git tracks or would, copied.

    Its package says where its code was taken from.
    """
    folder = Path(head[1]) / "project"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    with (folder / "smolray" / "launch" / "driver.py").open("a") as file:
        file.write('\nprint("code of the job:", __file__, flush=True)\n')
    return folder


@pytest.fixture(scope="module")
def settings(head):
    """Overrides of a small real run: 300 questions, two workers, two epochs of some 40 steps, every sample audited."""
    raw = Path(head[1]) / "raw"
    export_easy_vqa(raw, limit=QUESTIONS)
    return [
        f"storage={head[1]}/runs",
        f"data.train={raw}/train.parquet",
        f"data.validation={raw}/test.parquet",
        "model.path=tiny",
        "train.per_device_train_batch_size=4",
        "train.global_batch=2",
        "train.num_train_epochs=2",
        "train.audit=true",
        "checkpoint.save_steps=10",
        "evaluate.eval_epochs=0",
        "evaluate.max_samples=16",
        "evaluate.batch_size=16",
        "evaluate.max_new_tokens=3",
        "resources.num_workers=2",
        "resources.cpus_per_worker=0.5",
    ]


def ray_job_submit(head, project, *arguments, token=TOKEN):
    """The command of the README, Ray's own."""
    command = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", head[0], "--working-dir", "."]
    return subprocess.run(
        [*command, *arguments],
        env=environment(head[1], token),
        cwd=project,
        capture_output=True,
        text=True,
        timeout=300,
    )


def train_command(settings, *overrides):
    return ["--", "python", "jobs/train.py", "--config", "demo", *settings, *overrides]


def test_ray_job_submit_trains_the_uploaded_project(head, project, settings):
    done = ray_job_submit(
        head, project, *train_command(settings, "name=plain", "train.max_steps=3", "resources.num_workers=1")
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "finished at step 3" in done.stdout
    [code] = [line for line in done.stdout.splitlines() if line.startswith("code of the job:")]
    assert "working_dir_files" in code, "the job ran the code of this machine and not the uploaded one"
    assert [e["step"] for e in read_events(f"{head[1]}/runs/plain") if e["event"] == "step"] == [1, 2, 3]
    uploaded = [path for path in Path(code.split(": ", 1)[1]).parents[2].rglob("*") if path.is_file()]
    assert uploaded and sum(path.stat().st_size for path in uploaded) < 5 * 2**20
    assert not any("tests" in path.parts or ".git" in path.parts for path in uploaded)


@pytest.mark.parametrize("token", [None, "f" * 64], ids=["none", "wrong"])
def test_ray_job_submit_without_the_token_is_refused(head, project, settings, token):
    done = ray_job_submit(head, project, *train_command(settings, "name=untrusted"), token=token)
    assert done.returncode != 0
    assert TOKEN not in done.stdout + done.stderr
    assert not (Path(head[1]) / "runs" / "untrusted").exists()


@pytest.mark.slow
def test_a_folder_without_a_checkout_submits_the_installed_code(head, settings, tmp_path):
    (tmp_path / "mine.yaml").write_text("name: bare\ntrain: {max_steps: 2}\n")
    (tmp_path / "data.bin").write_bytes(b"x" * 2**20)
    arguments = ["submit", "--address", head[0], "--config", "mine.yaml", *settings, "--follow"]
    done = smolray(head[1], *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert [e["step"] for e in read_events(f"{head[1]}/runs/bare") if e["event"] == "step"] == [1, 2]


@pytest.mark.slow
def test_a_run_stopped_and_resumed_by_name_sees_every_sample_once(head, project, settings):
    address, folder = head
    run_dir, place = f"{folder}/runs/real", ["--address", address, "--storage", f"{folder}/runs"]
    done = smolray(
        folder,
        "submit",
        "--address",
        address,
        "--config",
        "demo",
        *settings,
        "name=real",
        cwd=project,
    )
    assert done.returncode == 0, done.stderr
    deadline = time.monotonic() + 180
    while not any(e["event"] == "step" and e["step"] >= 5 for e in read_events(run_dir)):
        assert time.monotonic() < deadline, read_events(run_dir)[-3:]
        time.sleep(0.2)
    stopped = smolray(folder, "stop", "real", *place)
    assert stopped.returncode == 0, stopped.stderr
    first = read_events(run_dir)
    assert (first[-1]["event"], first[-1]["status"]) == ("end", "stopped"), "it came to its end before it was stopped"
    assert first[-2]["event"] == "checkpoint" and first[-2]["step"] == first[-1]["step"] < 70
    assert "ended by itself" in stopped.stdout, "a run that has saved ends its job"
    resumed = smolray(folder, "resume", "real", *place, "--follow", cwd=project)
    assert resumed.returncode == 0, resumed.stdout[-3000:] + resumed.stderr[-3000:]
    events = read_events(run_dir)
    assert events[-1]["status"] == "finished"
    assert [e["step"] for e in events if e["event"] == "resume"] == [first[-1]["step"]]
    steps = [e["step"] for e in surviving(events) if e["event"] == "step"]
    assert len(steps) >= 30 and steps == list(range(1, len(steps) + 1))
    history = consumed(run_dir)
    assert sorted(history) == [0, 1]
    for rows in history.values():
        assert Counter(i for _, i in rows) == Counter(f"train-{i}" for i in range(QUESTIONS))
