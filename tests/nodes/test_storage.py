"""Runs whose storage is an S3 server on another node, or is full."""

import contextlib
import json
import re
import sys
import time

import pytest

from smolray.run import checkpoint
from smolray.run.folder import RunFolder
from tests.nodes.conftest import ROOT
from tests.nodes.runs import SAVE_STEPS, Run, check_history, settings

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]
UPLOAD = (
    "import sys; from pathlib import Path; from smolray import storage; "
    "storage.write_bytes(sys.argv[2], Path(sys.argv[1]).read_bytes())"
)
HISTORY = """
import json
from smolray.train.audit import consumed
from smolray.run.events import read_events
print(json.dumps([read_events("{run}"), list(consumed("{run}").items())]))
"""


def test_ray_job_submit_trains_on_two_nodes_with_storage_on_a_third(cluster, shared, bucket):
    laptop, name = cluster.lan["laptop"], "from-laptop"
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": cluster.token, "PYTHONPATH": str(ROOT)}
    s3 = [f"{k}={v}" for k, v in bucket.items()]
    done = laptop.run(
        "env",
        *s3,
        f"PYTHONPATH={ROOT}",
        sys.executable,
        "-c",
        UPLOAD,
        str(shared / "train.parquet"),
        "s3://bucket/data/train.parquet",
    )
    assert done.returncode == 0, done.stderr
    job = [
        "python",
        "jobs/train.py",
        *settings(name, "s3://bucket", "s3://bucket/data"),
        "data.shards=s3://bucket/shards",
        "engine.stage=2",
    ]
    submit = ["ray", "job", "submit", "--address", cluster.address, "--working-dir", ".", "--", *job]
    began = time.monotonic()
    done = laptop.run("env", "-C", str(ROOT), *(f"{k}={v}" for k, v in token.items()), *submit, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    told = cluster.python(HISTORY.format(run=f"s3://bucket/runs/{name}"), node="laptop", **bucket)
    events, history = json.loads(told)
    check_history(events, dict(history))
    [start] = [e for e in events if e["event"] == "start"]
    steps = [e for e in events if e["event"] == "step"]
    assert start["workers"] == 2, "one on each node"
    assert bucket["AWS_SECRET_ACCESS_KEY"] not in told + done.stdout + done.stderr
    print(
        f"{len(steps)} steps on 2 nodes, {time.monotonic() - began:.0f} s in all, "
        f"{steps[-1]['time'] - steps[0]['time']:.0f} s of training, 0 s interrupted"
    )


def test_a_full_storage_is_reported_and_the_run_resumes_with_room(cluster, shared):
    run = Run(cluster, shared, "full")
    run.reaches(SAVE_STEPS + 3)
    step_info, ballast = time.time(), shared / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:  # until there is no room: the run writes meanwhile
            file.write(bytes(2**20))
    run.ends()
    [why, *_] = re.findall(rf"no room for {run.run_dir}/\S+: No space left on device", run.log.read_text())
    print(f"{time.time() - step_info:.1f} s after the storage was full: {why}")
    steps = checkpoint.list_steps(run.run_dir)
    for step in steps:
        checkpoint.verify(RunFolder(run.run_dir).checkpoint(step))
    assert steps, "what was saved before is still there, and whole"
    ballast.unlink()
    step_info = time.time()
    run = Run(cluster, shared, "full")
    seconds = run.trains_again_after(step_info)
    print(f"training again {seconds:.1f} s after there was room")
    assert run.events("resume")[-1]["step"] == steps[-1]
    run.finishes()
