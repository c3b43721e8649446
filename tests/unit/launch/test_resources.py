"""How many workers a cluster has room for, and how many `resources.num_workers: auto` takes of it."""

import pytest

from smolray.config import load_config
from smolray.launch.resources import Cluster, NodeResources, count_workers, most_workers


@pytest.mark.parametrize(
    ("available", "overrides", "workers"),
    [
        ({"CPU": 16.0, "GPU": 3.0}, [], 3),
        ({"CPU": 3.0, "GPU": 8.0}, [], 2),
        ({"CPU": 16.0, "GPU": 3.0}, ["resources.use_gpu=no", "resources.num_workers=2"], 2),
        ({"CPU": 0.5}, [], 1),
    ],
)
def test_a_probe_takes_every_gpu_and_as_many_cpu_workers_as_are_asked_for(available, overrides, workers):
    assert most_workers(load_config(None, ["model.dtype=float32", *overrides]), available) == workers


def cluster(*nodes):
    """A cluster of nodes, each (CPUs, GPUs) or (CPUs, GPUs, labels)."""
    made = tuple(NodeResources({"CPU": n[0], "GPU": n[1]}, *(n[2:] or ({},))) for n in nodes)
    return Cluster({"CPU": sum(n[0] for n in nodes), "GPU": sum(n[1] for n in nodes)}, made)


TWO = cluster((16.0, 1.0), (16.0, 1.0))
LABELLED = cluster((16.0, 2.0, {"smolray.io/gpu": "rtx-4090"}), (16.0, 3.0, {"smolray.io/gpu": "rtx-3090"}))


@pytest.mark.parametrize(
    ("there", "overrides", "workers", "why"),
    [
        (TWO, [], 2, "2 workers for 2 GPUs: one for each GPU"),
        (cluster((16.0, 1.0)), [], 1, "1 worker for 1 GPU: one for each GPU"),
        (cluster((16.0, 0.0), (16.0, 0.0)), [], 1, "1 worker: no GPU is there"),
        (TWO, ["resources.use_gpu=no"], 1, "1 worker: resources.use_gpu = no"),
        (cluster((2.0, 4.0)), [], 1, "the CPUs are enough for no more (1 CPU, and 0.25 CPU for its data tasks)"),
        (cluster((16.0, 1.0), (1.0, 1.0)), [], 1, "the CPUs are enough for no more"),
        (cluster((16.0, 4.0)), ["train.global_batch=2"], 2, "a step has 2 micro-batches (train.global_batch)"),
        (cluster((16.0, 5.0)), ["resources.gpus_per_worker=2"], 2, "2 workers for 5 GPUs: 2 GPUs each"),
        (cluster((16.0, 1.0), (16.0, 1.0)), ["resources.gpus_per_worker=2"], 1, "2 GPUs each"),
        (TWO, ["resources.gpus_per_worker=0.5"], 1, "two cannot share a GPU"),
        (LABELLED, ["resources.label_selector={smolray.io/gpu: rtx-4090}"], 2, "2 workers for 2 GPUs"),
        (cluster((16.0, 5.0)), ["engine=pipeline", "engine.pipeline_stages=2"], 4, "whole pipelines of 2 stages"),
        (cluster((16.0, 5.0)), ["engine=pipeline", "train.global_batch=2"], 5, "one for each GPU"),
        (
            cluster((16.0, 4.0)),
            ["engine=trl", "image.upscale=true", "train.global_batch=6"],
            3,
            "divides train.global_batch = 6",
        ),
    ],
)
def test_auto_takes_all_gpus_that_the_run_can_use(there, overrides, workers, why):
    config = load_config(None, ["model.dtype=float32", *overrides])
    counted, reason = count_workers(config, there, config.train.global_batch)
    assert counted == workers and why in reason
