"""A run is resolved once on the cluster that is there, and keeps its global batch on any other."""

import pytest

from smolray.config import ConfigError, load_config, to_yaml
from smolray.launch.resolve import resolve
from smolray.launch.resources import Cluster, NodeResources, ResourcesError
from smolray.run.progress import event_line


def gpus(number, cpus=16.0):
    resources = {"CPU": cpus, "GPU": float(number)}
    return Cluster(resources, (NodeResources(resources, {}),))


@pytest.fixture
def make(tmp_path):
    return lambda *overrides: load_config(None, [f"storage={tmp_path}", "model.dtype=float32", *overrides])


def launched(run):
    """What a launch leaves for the next one."""
    from smolray.launch.driver import store_config

    store_config(run)
    return run


def test_auto_is_a_number_in_the_run_and_auto_in_its_stored_config(make):
    run = resolve(make(), gpus(2))
    assert run.config.resources.num_workers == 2 and run.config.train.global_batch == 2
    assert run.stored.resources.num_workers == "auto" and run.stored.train.global_batch == 2
    line = event_line({"event": "launch", "workers": run.reason, "logs": "/tmp/ray/logs/worker-*"})
    assert line.splitlines()[0] == "launch  2 workers for 2 GPUs: one for each GPU"
    assert "/tmp/ray/logs/worker-*" in line.splitlines()[1]


def test_without_a_gpu_auto_is_one_worker(make):
    run = resolve(make("train.gradient_accumulation_steps=3"), gpus(0))
    assert run.config.resources.num_workers == 1 and run.config.global_batch == 3


@pytest.mark.parametrize(("first", "then"), [(1, 4), (4, 1), (2, 3)])
def test_a_run_keeps_its_global_batch_on_another_number_of_gpus(make, first, then):
    begun = launched(resolve(make("train.gradient_accumulation_steps=2"), gpus(first)))
    resumed = resolve(make("train.gradient_accumulation_steps=2"), gpus(then))
    assert resumed.config.global_batch == begun.config.global_batch == 2 * first
    assert resumed.begun and not begun.begun
    assert resumed.config.resources.num_workers == min(then, 2 * first)


def test_a_run_resumed_from_its_stored_config_counts_the_gpus_again(make):
    begun = launched(resolve(make("train.global_batch=6"), gpus(2)))
    stored = load_config(f"{begun.config.run_dir}/config.yaml")
    resumed = resolve(stored, gpus(3))
    assert resumed.config.resources.num_workers == 3 and resumed.config.global_batch == 6
    assert to_yaml(resumed.stored) == to_yaml(begun.stored), "the settings of a finished run are found again"


def test_a_planned_run_may_take_as_many_workers_as_there_are_gpus(make):
    begun = launched(resolve(make("engine=auto"), gpus(3)))
    assert begun.config.resources.num_workers == (1, 3) and begun.config.global_batch == 3
    resumed = resolve(make("engine=auto"), gpus(4))
    assert resumed.config.resources.num_workers == (1, 4) and resumed.config.global_batch == 3


def test_a_number_of_workers_that_is_given_is_not_counted(make):
    run = resolve(make("resources.num_workers=1"), gpus(2))
    assert run.config.resources.num_workers == run.stored.resources.num_workers == 1 and not run.reason


def test_settings_are_checked_before_the_resources_of_the_cluster(make):
    launched(resolve(make(), gpus(1)))
    with pytest.raises(ConfigError, match=r"train\.global_batch = 1 is below the 4 workers"):
        resolve(make("resources.num_workers=4"), gpus(2))
    with pytest.raises(ResourcesError, match="the cluster has 2 GPU"):
        resolve(make("resources.num_workers=4", "train.global_batch=4"), gpus(2))
