"""GPUs that a worker would refuse are not planned, and the plan says why."""

import pytest
import torch

from smolray.config import ConfigError, load_config
from smolray.planner.describe import to_json, words
from smolray.planner.gpus import KNOWN_GPUS
from smolray.train.setup import check_device
from smolray.tune.cost import estimate_cost
from tests.unit.planner.test_plan import SHAPES, DataStatistics, config_of, plan_of

WHEEL = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


def test_a_gpu_without_bf16_units_is_planned_in_fp16():
    plan = plan_of("2x t4", "random-256m")
    assert plan.chosen is None and not plan.rows
    assert plan.settings()["model.dtype"] == "float16"
    said = words(plan)
    assert "model.dtype = bfloat16: t4 has no bf16 units" in said and "nearest: float16" in said
    assert "float16 in place of bfloat16" in said and to_json(plan)["refused"].keys() == {"t4"}
    assert plan_of("2x t4", "random-256m", "model.dtype=float16").chosen is not None


def test_a_gpu_that_torch_is_not_built_for_is_not_planned_in_any_dtype():
    for dtype in ("float32", "float16", "bfloat16"):
        plan = plan_of("1x v100-32", "random-256m", f"model.dtype={dtype}")
        assert plan.chosen is None and plan.settings() == {}
        assert "v100-32 has compute capability 7.0" in words(plan) and "sm_75" in words(plan)


def test_among_others_only_the_refused_gpus_are_left_out():
    alone, beside = (plan_of(gpus, "random-256m") for gpus in ("1x rtx3090", "1x rtx3090 + 4x t4 + 1x v100-16"))
    assert beside.chosen.names == ("rtx3090",)
    assert beside.chosen.samples_per_second == alone.chosen.samples_per_second
    assert all(set(row.names) == {"rtx3090"} for row in beside.rows)
    assert beside.as_written.names == ("rtx3090",)
    said = words(beside)
    assert said.count("Not used") == 2 and "Left idle" not in said


def test_a_trial_on_a_refused_gpu_is_not_run():
    config = config_of("random-256m", "resources.num_workers=1")
    statistics = DataStatistics.default(config, SHAPES["random-256m"])
    assert "no bf16 units" in estimate_cost(config, SHAPES["random-256m"], statistics, [KNOWN_GPUS["t4"]]).lacks


@pytest.mark.parametrize("gpu", KNOWN_GPUS.values(), ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_planner_refuses_what_a_worker_refuses(gpu, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu.name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu.capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: WHEEL)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: gpu.capability >= (8, 0))
    config = load_config(None, [f"model.dtype={dtype}"])
    try:
        check_device(config, torch.device("cuda"))
    except ConfigError as error:
        assert str(error) == gpu.cannot_run(dtype) != ""
    else:
        assert gpu.cannot_run(dtype) == ""
