"""What a run asks of the cluster is checked before anything starts: within seconds, and with the nearest that works."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smolray.config import load_config
from smolray.launch.driver import launch_run
from smolray.launch.resources import Cluster, ResourcesError, check_resources, count_workers, use_gpu
from smolray.run.events import read_events

ROOT = Path(__file__).parents[2]
GPU_NODE = {"CPU": 16.0, "GPU": 2.0, "accelerator_type:GeForce-RTX-3090": 1.0}
LAPTOP = {"CPU": 2.0, "memory": 8e9}


def config(*overrides):
    return load_config(None, ["model.dtype=float32", *overrides])


def refusal(available, *overrides):
    with pytest.raises(ResourcesError) as told:
        check_resources(config(*overrides), available)
    return str(told.value)


def nearest(message):
    """The setting that the message proposes."""
    return message.rsplit("nearest: ", 1)[1]


def test_too_many_gpus_are_refused_with_the_nearest_that_works():
    asked = ["resources.num_workers=4", "resources.use_gpu=yes"]
    message = refusal(GPU_NODE, *asked)
    assert "4 workers x 1 GPU" in message and "the cluster has 2 GPU" in message and "GeForce-RTX-3090" in message
    assert nearest(message) == "resources.num_workers=2"
    check_resources(config(*asked, nearest(message)), GPU_NODE)


def test_two_gpus_a_worker_are_counted_as_two():
    asked = ["resources.num_workers=2", "resources.gpus_per_worker=2"]
    message = refusal(GPU_NODE, *asked)
    assert "2 workers x 2 GPU" in message
    check_resources(config(*asked, nearest(message)), GPU_NODE)


def test_a_gpu_where_there_is_none_leads_to_the_cpu():
    message = refusal(LAPTOP, "resources.use_gpu=yes", "resources.cpus_per_worker=0.5")
    assert "the cluster has 0 GPU" in message
    check_resources(config("resources.cpus_per_worker=0.5", nearest(message)), LAPTOP)


@pytest.mark.parametrize(
    "asked",
    [
        ["resources.num_workers=2", "resources.cpus_per_worker=1"],
        ["resources.num_workers=3", "resources.cpus_per_worker=1"],
        ["resources.num_workers=9", "resources.cpus_per_worker=2"],
        ["resources.num_workers=16", "resources.cpus_per_worker=0.5"],
        ["resources.num_workers=1", "resources.cpus_per_worker=2"],
        ["resources.num_workers=2", "resources.cpus_per_worker=0.5", "data.num_cpus_per_task=1.5"],
        ["resources.num_workers=1", "data.num_cpus_per_task=4"],
        ["resources.num_workers=2", "resources.cpus_per_worker=3", "data.num_cpus_per_task=4"],
    ],
    ids=" ".join,
)
def test_workers_that_leave_no_cpu_for_data_are_refused_with_a_remedy(asked):
    message = refusal(LAPTOP, *asked)
    assert "the cluster has 2" in message
    check_resources(config(*asked, *nearest(message).split()), LAPTOP)


def test_an_elastic_run_needs_only_its_smallest_group():
    elastic = ["resources.num_workers=[1,8]", "train.global_batch=8"]
    check_resources(config(*elastic), GPU_NODE)
    message = refusal(GPU_NODE, *elastic, "resources.num_workers=[4,8]")
    assert "asked for 4 workers" in message
    check_resources(config(*elastic, nearest(message)), GPU_NODE)


def test_an_elastic_run_that_may_starve_its_data_tasks_is_refused():
    elastic = ["resources.num_workers=[1,8]", "train.global_batch=8", "resources.cpus_per_worker=0.5"]
    message = refusal(LAPTOP, *elastic)
    assert "up to 4 workers" in message and nearest(message) == "resources.num_workers=[1,2]"
    check_resources(config(*elastic, nearest(message)), LAPTOP)


def test_a_gpu_is_used_where_there_is_one_unless_it_is_switched_off():
    check_resources(config("resources.num_workers=2"), GPU_NODE)
    check_resources(config("resources.num_workers=4", "resources.use_gpu=no"), GPU_NODE)


def test_nodes_that_the_autoscaler_has_still_to_start_count(ray_cluster):
    """The cluster's description as Ray's autoscaler writes it: no node of the group `gpu` is up."""
    from ray._raylet import GCS_AUTOSCALER_CLUSTER_CONFIG_KEY, GCS_AUTOSCALER_STATE_NAMESPACE
    from ray.core.generated.autoscaler_pb2 import ClusterConfig, NodeGroupConfig
    from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_put

    before = Cluster.connected()
    with pytest.raises(ResourcesError, match="the cluster has 0 GPU"):
        check_resources(config("resources.use_gpu=yes"), before.available)

    gpus = NodeGroupConfig(resources={"CPU": 8, "GPU": 1}, min_count=0, max_count=8, name="gpu")
    head = NodeGroupConfig(resources={"CPU": 0}, min_count=0, max_count=0, name="headgroup")
    described = ClusterConfig(node_group_configs=[gpus, head]).SerializeToString()
    key, namespace = GCS_AUTOSCALER_CLUSTER_CONFIG_KEY.encode(), GCS_AUTOSCALER_STATE_NAMESPACE.encode()
    _internal_kv_put(key, described, overwrite=True, namespace=namespace)
    try:
        after = Cluster.connected()
        assert (after.available["GPU"], after.available["CPU"]) == (8, 64)
        assert use_gpu(config(), after.available), "where none is up yet, the run would train on CPUs"
        check_resources(config("resources.num_workers=8"), after.available)
        assert count_workers(config("resources.num_workers=auto"), after, None)[0] == 8
        with pytest.raises(ResourcesError, match=r"nearest: resources\.num_workers=8"):
            check_resources(config("resources.num_workers=9"), after.available)
    finally:
        _internal_kv_del(key, namespace=namespace)
    assert Cluster.connected().available == before.available


@pytest.mark.parametrize("asked", ["resources.use_gpu=yes", "resources.cpus_per_worker=64"])
def test_a_run_that_does_not_fit_fails_in_seconds_and_says_so_in_its_log(make_run, asked):
    run = make_run("too-large", asked)
    began = time.monotonic()
    with pytest.raises(ResourcesError, match="nearest: resources"):
        launch_run(run)
    assert time.monotonic() - began < 5
    events = read_events(run.run_dir)
    assert [e["event"] for e in events[-2:]] == ["preparing", "end"] and events[-1]["status"] == "failed"
    assert "nearest: resources" in events[-1]["error"]


@pytest.mark.slow
def test_two_runs_at_a_time_on_one_machine_do_not_meet(small_vqa, tmp_path):
    """Each starts a Ray of its own; both prepare the same source into the same storage at the same time."""
    arguments = [
        f"storage={tmp_path}/runs",
        f"data.train={small_vqa}/train.parquet",
        "model.path=tiny",
        "model.dtype=float32",
        "data.max_length=1024",
        "train.max_steps=5",
        "resources.num_workers=2",
        "resources.cpus_per_worker=0.5",
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    both = [
        subprocess.Popen(
            [sys.executable, "jobs/train.py", f"name={name}", *arguments], cwd=ROOT, env=environment, **piped
        )
        for name in ("one", "two")
    ]
    told = [run.communicate(timeout=500)[0] for run in both]
    for run, text, name in zip(both, told, ("one", "two"), strict=True):
        assert run.returncode == 0, text[-3000:]
        assert [e["step"] for e in read_events(f"{tmp_path}/runs/{name}") if e["event"] == "step"] == [1, 2, 3, 4, 5]
