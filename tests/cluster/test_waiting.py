"""On a cluster whose room another run holds, a run says what it waits for and who holds it, and then trains."""

import json
import subprocess
import sys
import threading
import time

import pytest

from smolray.config import load_config
from smolray.launch.driver import launch_run
from smolray.launch.waiting import waits_for
from smolray.run.events import read_events
from smolray.run.status import run_status
from tests.commands import smolray

# Holds what the workers of a run would, as Ray Train does: in a placement group of its driver's job.
HOLD = """
import sys
import ray
from smolray.launch.waiting import announce
ray.init(address=sys.argv[1], log_to_driver=False)
announce("run first")
ray.get(ray.util.placement_group([{"CPU": 1.25}] * 2).ready())
print("held", flush=True)
sys.stdin.readline()
"""
WHAT = "2 x 1.25 CPU; held by run first"


@pytest.fixture
def first(ray_cluster):
    """Another driver, which holds 2.5 of the 4 CPUs until it is told to end."""
    address = ray_cluster.get_runtime_context().gcs_address
    command = [sys.executable, "-c", HOLD, address]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_nodes_that_are_not_up_yet_are_told_as_such(ray_cluster):
    assert waits_for(2, {"CPU": 0.5, "GPU": 1}) == "2 x 0.5 CPU + 1 GPU; the nodes for it are not up yet"
    assert waits_for(1, {"CPU": 0.5}) == ""


@pytest.mark.slow
def test_a_run_that_waits_for_another_says_so_and_trains_after_it(first, tmp_path, capsys):
    lines = [{"id": str(i), "question": f"what is {i}?", "answer": str(i)} for i in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = [
        *("name=second", f"storage={tmp_path}/runs", f"data.train={tmp_path}/train.jsonl", "train.max_steps=1"),
        *("model.path=tiny", "model.dtype=float32", "train.per_device_train_batch_size=2", "resources.num_workers=2"),
        *("resources.cpus_per_worker=1.25", "resources.use_gpu=no"),
    ]
    config = load_config(None, settings)
    seen = {}

    def watch():
        """Look at the run while it waits, then let the other one end."""
        while not any(e["event"] == "waiting" for e in read_events(config.run_dir)):
            time.sleep(0.2)
        seen["status"] = run_status(config.run_dir)
        seen["shown"] = " ".join(smolray("status", "second", "--storage", f"{tmp_path}/runs").output.split())
        first.stdin.write("\n")
        first.stdin.flush()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    assert launch_run(config)["status"] == "finished"
    watcher.join(10)

    assert (seen["status"].state, seen["status"].waits_for) == ("waiting", WHAT)
    assert WHAT in seen["shown"]
    assert f"waiting for {WHAT}" in capsys.readouterr().out
    told = [e["what"] for e in read_events(config.run_dir) if e["event"] == "waiting"]
    assert told == [WHAT], "once, not every few seconds"
    after = run_status(config.run_dir)
    assert (after.state, after.waits_for, after.step) == ("finished", None, 1)
