"""A search over two nodes, one of which loses power: its trials resume from their checkpoints on the other."""

import subprocess
import time

import pytest
import yaml

from smolray import storage
from smolray.config import load_config
from smolray.run import checkpoint
from smolray.run.events import read_events
from smolray.train.audit import consumed
from smolray.tune.log import read_trials, search_folder
from tests.nodes.conftest import ROOT
from tests.nodes.runs import SAVE_STEPS, check_history, settings

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]


def submitted(cluster, *arguments):
    """`ray job submit` of a search, typed on the laptop."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": cluster.token, "PYTHONPATH": str(ROOT)}
    job = [
        "ray",
        "job",
        "submit",
        "--address",
        cluster.address,
        "--working-dir",
        ".",
        "--",
        "python",
        "jobs/tune.py",
        *arguments,
    ]
    return cluster.lan["laptop"].start(
        "env", "-C", str(ROOT), *(f"{k}={v}" for k, v in token.items()), *job, log="search.log"
    )


def test_a_dead_node_costs_its_trials_only_steps_since_checkpoints(cluster, shared):
    given = [
        *settings("nodes", shared, shared, epochs=1),
        f"data.validation={shared}/test.parquet",
        "evaluate.eval_epochs=1",
        "evaluate.max_samples=64",
    ]
    config = load_config(given[1], [*given[2:], "resources.num_workers=1"])
    search = {
        "space": {"optimizer.learning_rate": {"choice": [3e-3, 2e-3, 1e-3, 5e-4]}},
        "algorithm": "grid",
        "scheduler": "none",
    }
    (shared / "search.yaml").write_text(
        yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True) | {"search": search})
    )
    folder, runs = search_folder(config.storage, "nodes"), f"{shared}/runs"
    job = submitted(cluster, "--config", f"{shared}/search.yaml")
    log = cluster.lan["laptop"].folder / "srv/search.log"

    def events(number, kind):
        return [e for e in read_events(storage.join(runs, f"nodes-{number}")) if e["event"] == kind]

    def wait(done, seconds, what):
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline and job.poll() is None, (
                f"{what}\n{log.read_text()[-4000:]}{cluster.logs()[-3000:]}"
            )
            time.sleep(0.3)

    wait(lambda: all(checkpoint.list_steps(f"{runs}/nodes-{n}") for n in (1, 2)), 300, "both first trials have saved")
    places = {n: events(n, "inventory")[0]["workers"][0]["node"] for n in (1, 2)}
    assert sorted(places.values()) == sorted(cluster.lan[name].ip for name in ("den", "loft")), "a trial on each node"
    step_info, stood = time.time(), {n: max(e["step"] for e in events(n, "step")) for n in (1, 2)}
    cluster.lan["loft"].off()
    dead = next(n for n, ip in places.items() if ip == cluster.lan["loft"].ip)
    wait(lambda: any(e["time"] > step_info for e in events(dead, "resume")), 300, "the trial of the dead node resumes")
    print(f"trial {dead} trains again {events(dead, 'resume')[-1]['time'] - step_info:.1f} s after its node lost power")
    cluster.lan["loft"].on()
    cluster.start("loft")
    try:
        assert job.wait(600) == 0, log.read_text()[-4000:]
    except subprocess.TimeoutExpired:
        pytest.fail(f"the search did not end\n{log.read_text()[-4000:]}")
    trials = read_trials(folder)
    assert [t.status for t in trials] == ["finished"] * 4, [t.reason for t in trials]
    for n, step in stood.items():
        assert all(e["step"] >= step - SAVE_STEPS for e in events(n, "resume")), (
            "only what came after the last checkpoint is trained again"
        )
    for trial in trials:
        check_history(read_events(f"{runs}/{trial.run}"), consumed(f"{runs}/{trial.run}"), epochs=1)
    assert storage.exists(storage.join(folder, "best.yaml"))
    left = cluster.python(
        "import ray; ray.init('auto', log_to_driver=False); "
        "print([g for g in ray.util.placement_group_table().values() if g['state'] != 'REMOVED'])"
    )
    assert left.strip().endswith("[]"), f"left behind: {left}"
    print(f"{len(trials)} trials, best {yaml.safe_load((shared / 'runs/nodes/best.yaml').read_text())['optimizer']}")
