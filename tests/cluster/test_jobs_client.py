"""The command line against a real job server that wants a token: submit, follow, stop, resume.

The job is a stand-in loop, so that this shows the client alone and takes seconds; it logs and answers the stop flag as the real one does.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

TOKEN = "0123456789abcdef" * 4
TRAIN = """
import argparse, time
from smolray import status, storage
from smolray.config import load_config, to_yaml
from smolray.events import EventLog

parser = argparse.ArgumentParser()
parser.add_argument("--config")
arguments, overrides = parser.parse_known_args()
config = load_config(arguments.config, overrides)
storage.write_bytes(config.run_dir + "/config.yaml", to_yaml(config).encode())
log = EventLog(config.run_dir)
log.write("start", workers=1, total_steps=config.train.max_steps)
for step in range(1, config.train.max_steps + 1):
    log.write("step", step=step, loss=1 / step)
    print("loop at step", step, flush=True)
    if storage.exists(config.run_dir + "/" + status.STOP_FLAG):
        log.write("end", status="stopped", step=step)
        time.sleep(config.seed)  # a job that lingers for so long
        raise SystemExit
    time.sleep(0.1)
log.write("end", status="finished", step=step)
"""


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def environment(folder, token=TOKEN):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SMOLRAY_"))}
    extra = {"RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0", "HOME": folder, "COLUMNS": "160"}
    extra |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {}
    return kept | extra | {"PATH": f"{Path(sys.executable).parent}:{kept['PATH']}"}


@pytest.fixture(scope="module")
def head():
    """A head node with a job server of its own; gives its address and a folder for it. Only its own process group is ended."""
    with tempfile.TemporaryDirectory(prefix="sj", ignore_cleanup_errors=True) as folder:
        ports = {name: free_port() for name in ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port")}
        flags = [f"--{name}={port}" for name, port in ports.items()]
        flags += ["--node-ip-address=127.0.0.1", "--num-cpus=2", "--object-store-memory=100000000", f"--temp-dir={folder}/r"]
        ray = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", *flags]
        with (Path(folder) / "head.log").open("w") as log:
            process = subprocess.Popen(ray, env=environment(folder), stdout=log, stderr=log, start_new_session=True)
        try:
            address = f"http://127.0.0.1:{ports['dashboard-port']}"
            wait_for(lambda: smolray(folder, "stop", "probe", "--storage", folder, "--address", address).returncode == 0, folder)
            yield address, folder
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # told politely it takes 30 s; what it started in other groups ends with its raylet
            process.wait()


def wait_for(ready, folder, seconds=90):
    run = Path(folder) / "probe"  # a run that has ended: stopping it only asks the job server
    run.mkdir()
    (run / "events.jsonl").write_text('{"event": "end", "time": 1, "attempt": 1, "status": "finished", "step": 1}\n')
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, (Path(folder) / "head.log").read_text()[-3000:]
        time.sleep(1)


def smolray(folder, *arguments, cwd=None, token=TOKEN):
    command = [sys.executable, "-c", "from smolray.cli import app; app()", *arguments]
    return subprocess.run(command, env=environment(folder, token), cwd=cwd or folder, capture_output=True, text=True, timeout=180)


@pytest.fixture(scope="module")
def checkout(head):
    folder = Path(head[1]) / "checkout"
    (folder / "jobs" / "configs").mkdir(parents=True)
    (folder / "jobs" / "train.py").write_text(TRAIN)
    (folder / "jobs" / "configs" / "a.yaml").write_text(f"storage: {head[1]}/runs\ntrain: {{max_steps: 5}}\n")
    return folder


def submit(head, checkout, *overrides, token=TOKEN):
    arguments = ["submit", "--address", head[0], "--config", "jobs/configs/a.yaml", *overrides]
    return smolray(head[1], *arguments, cwd=checkout, token=token)


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
    assert [line for line in done.stdout.splitlines() if line.startswith("loop")] == [f"loop at step {i}" for i in range(1, 6)]
    assert "SUCCEEDED" in done.stdout
    told = smolray(head[1], "status", "short", "--storage", f"{head[1]}/runs").stdout
    assert "finished" in told and "5/5" in told


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
