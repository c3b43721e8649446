"""Queued runs on a cluster with room for one: each trains when it is its turn, and the next one after it."""

import json
import os
import subprocess
import sys
import time

import pytest

from smolray.run.events import read_events
from smolray.run.queue import read_queue
from tests.commands import smolray

pytestmark = pytest.mark.slow


def waiting(run_dir):
    return [e["what"] for e in read_events(str(run_dir)) if e["event"] == "waiting"]


def when(run_dir, event):
    return next(e["time"] for e in read_events(str(run_dir)) if e["event"] == event)


def test_the_run_of_higher_priority_trains_first_and_the_other_after_it(ray_cluster, tmp_path):
    lines = [{"id": str(i), "question": f"what is {i}?", "answer": str(i)} for i in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    root, started = tmp_path / "runs", {}
    held = ray_cluster.util.placement_group([{"CPU": 1.25}] * 2)
    ray_cluster.get(held.ready())

    def submit(name, *more):
        command = [sys.executable, "-m", "smolray", "train", f"name={name}", f"storage={root}", "resources.queue=true"]
        command += [f"data.train={tmp_path}/train.jsonl", "train.max_steps=1", "model.path=tiny", "model.dtype=float32"]
        command += ["train.per_device_train_batch_size=2", "resources.num_workers=2", "resources.cpus_per_worker=1.25"]
        environment = os.environ | {"RAY_ADDRESS": ray_cluster.get_runtime_context().gcs_address}
        with (tmp_path / f"{name}.log").open("w") as log:
            command += ["resources.use_gpu=no", *more]
            started[name] = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 200
        while not waiting(root / name):
            assert started[name].poll() is None, (tmp_path / f"{name}.log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.2)

    try:
        submit("first")
        submit("urgent", "resources.priority=5")
        assert [e.run for e in read_queue(str(root))] == ["urgent", "first"]
        shown = smolray("queue", "--storage", str(root)).output.splitlines()
        assert [line.split()[:2] for line in shown[1:]] == [["1", "urgent"], ["2", "first"]]
        ray_cluster.util.remove_placement_group(held)
        for name in ("urgent", "first"):
            assert started[name].wait(240) == 0, (tmp_path / f"{name}.log").read_text()[-3000:]
    finally:
        for process in started.values():
            process.kill()

    assert waiting(root / "urgent")[0].startswith("place 1 of 2 in the queue; 2 x 1.25 CPU; held by")
    assert waiting(root / "first")[0].startswith("place 1 of 1 in the queue; 2 x 1.25 CPU; held by")
    assert any(what.startswith("place 2 of 2") for what in waiting(root / "first"))
    assert when(root / "first", "start") > when(root / "urgent", "end"), "there is room for one"
    assert read_queue(str(root)) == []
