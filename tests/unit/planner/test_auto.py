"""engine: auto takes the planner's choice on the GPUs found, also on fewer, and says plainly when nothing fits."""

import pytest

from smolray.config import load_config
from smolray.planner.auto import NothingFitsError, bounded, choose
from smolray.planner.inventory import Interconnect
from smolray.planner.model_files import known_shape
from smolray.planner.probe import HardwareProbe, WorkerHardware
from smolray.planner.statistics import DataStatistics

SHAPE = known_shape("random-2.2b")
GBIT = Interconnect(117e6, 1e-4)


def nodes(*gpus, link=GBIT):
    """A HardwareProbe of nodes with one GPU each: (name, GB, TFLOP/s)."""
    workers = [
        WorkerHardware(f"10.0.0.{i}", f"id{i}", name, int(gb * 1e9), tflops, tflops / 2, 9e11, True, 16)
        for i, (name, gb, tflops) in enumerate(gpus)
    ]
    return HardwareProbe(tuple(workers), {(a, b): link for a in range(len(gpus)) for b in range(a + 1, len(gpus))})


def auto_run(*overrides):
    return bounded(
        load_config(
            None,
            ["engine=auto", "model.path=random-2.2b", "resources.num_workers=3", "train.global_batch=12", *overrides],
        )
    )


def plan(config, seen, begun=False):
    return choose(config, DataStatistics.default(config, SHAPE), seen, begun, SHAPE)


THREE = [("RTX 3090", 24, 60.0), ("RTX 4090", 24, 150.0), ("RTX 3090", 24, 60.0)]


def test_over_a_slow_network_stages_are_bound_to_their_planned_gpus():
    chosen = plan(auto_run(), nodes(*THREE))
    run = chosen.run
    assert run.engine.name == "pipeline" and sum(run.engine.partition) == len(SHAPE.layers)
    assert len(chosen.nodes) == run.resources.num_workers == len(run.engine.gpus) > 1
    seen = nodes(*THREE)
    assert [seen.workers[rank].node_id for rank in seen.ranks(run.engine.gpus)] == list(chosen.nodes)
    assert (
        chosen.reported["settings"]["engine.partition"] == list(run.engine.partition)
        and "Chosen: a pipeline" in chosen.reported["words"]
    )
    assert chosen.kept.engine.name == "auto", "it is planned again when it is resumed"


def test_a_run_that_lost_a_gpu_resumes_with_the_same_step_size():
    first = plan(auto_run(), nodes(*THREE))
    again = plan(first.kept, nodes(*THREE[:2]), begun=True)
    assert again.run.resources.num_workers <= 2 and set(again.nodes) <= {"id0", "id1"}
    for key in ("per_device_train_batch_size", "global_batch"):
        assert getattr(again.run.train, key) == getattr(first.run.train, key) == getattr(first.kept.train, key)
    assert again.run.global_batch == first.run.global_batch


def test_where_two_gpus_are_too_small_the_error_says_what_would_fit():
    """8-bit Adam, which ZeRO cannot shard or offload: three GPUs hold the model as a pipeline, two do not."""
    small = [("RTX 4080", 17, 90.0)] * 3
    first = plan(auto_run("optimizer.name=adamw_8bit"), nodes(*small))
    assert len(first.run.engine.partition) == 3
    with pytest.raises(NothingFitsError, match=r"Nothing fits on .*lacks .* GB(.|\n)*It fits with"):
        plan(first.kept, nodes(*small[:2]), begun=True)


def test_fast_links_or_small_models_need_no_binding_to_gpus():
    shape = known_shape("random-256m")
    config = load_config(
        None, ["engine=auto", "model.path=random-256m", "resources.num_workers=4", "train.global_batch=32"]
    )
    seen = nodes(*[("A100", 80, 250.0)] * 4, link=Interconnect(2e10, 1e-5))
    chosen = choose(config, DataStatistics.default(config, shape), seen, False, shape)
    assert chosen.run.engine.name == "zero" and chosen.run.engine.gpus is None
    assert len(chosen.nodes) == chosen.run.resources.num_workers


def test_what_the_run_cannot_have_is_not_chosen():
    slow = nodes(*THREE)
    full_dpo = plan(
        auto_run("method=dpo", "dpo.reference=copy", "model.gradient_checkpointing=true", "model.path=random-256m"),
        slow,
    )
    assert full_dpo.run.engine.name == "zero" and full_dpo.run.engine.stage < 3, (
        "a frozen copy is neither piped nor sharded"
    )
    speed = plan(auto_run("train.load_balancing=speed", "lora.r=8", "model.train=[]"), slow)
    assert speed.run.engine.name == "zero" and speed.run.engine.stage < 3


def test_a_cpu_has_nothing_to_offload_to():
    here = HardwareProbe(
        tuple(WorkerHardware("10.0.0.1", "id", "CPU Xeon", 4 * 10**9, 0.05, 0.05, 1e10, True, 2) for _ in range(2)), {}
    )
    config = auto_run("model.dtype=float32").replace({"model.gradient_checkpointing": True})
    with pytest.raises(NothingFitsError) as refused:
        plan(config, here)
    assert "offload" not in str(refused.value)


def test_the_number_of_workers_is_an_upper_limit():
    assert auto_run().resources.num_workers == (1, 3)
    assert bounded(load_config(None, ["engine=auto", "resources.num_workers=[2,4]"])).resources.num_workers == (2, 4)
    assert bounded(load_config(None, ["resources.num_workers=4"])).resources.num_workers == 4
