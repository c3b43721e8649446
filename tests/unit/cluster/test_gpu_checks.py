"""What ails a GPU is named with its node, its number and a remedy."""

import pytest

from smolray.cluster.gpu_checks import gpu_health
from smolray.cluster.gpu_pairs import PairOutcome
from tests.unit.cluster.test_checks import GPU_FACTS, HEALTHY

TWO = HEALTHY | {"gpus": [GPU_FACTS, GPU_FACTS], "ray_gpus": 2}


def health(gpu=None, **changes):
    facts = TWO | {"gpu_pairs": [PairOutcome((0, 1))]} | changes
    return gpu_health("den", facts | {"gpus": [GPU_FACTS, GPU_FACTS | (gpu or {})]})


def test_healthy_gpus_and_none_have_no_fault():
    assert [f.level for f in health()] == ["ok", "ok"]
    assert gpu_health("den", HEALTHY | {"gpus": []}) == []
    assert [f.level for f in health(gpu={"lanes": (None, None)}, xid=None, gpu_pairs=None)] == ["ok", "ok"]


@pytest.mark.parametrize(
    ("gpu", "level", "found", "remedy"),
    [
        ({"slowed": ["too hot"]}, "warn", "slowed down, too hot", "nvidia-smi -pl"),
        ({"lanes": (1, 16)}, "warn", "1 of 16 PCIe lanes", "riser"),
        ({"memory_errors": 3}, "fail", "3 memory errors", "replace"),
        ({"rows_to_replace": True}, "warn", "next start", "restart"),
        ({"rows_to_replace": True, "rows_broken": True}, "fail", "cannot be replaced", "replace the GPU"),
    ],
)
def test_a_fault_of_one_gpu_is_named_with_its_remedy(gpu, level, found, remedy):
    fault = health(gpu)[0]
    assert (fault.name, fault.node, fault.level) == ("GPU 1", "den", level)
    assert found in fault.found and remedy in fault.remedy


def test_eight_of_sixteen_lanes_are_enough():
    assert [f.level for f in health({"lanes": (8, 16)})] == ["ok", "ok"]
    assert [f.level for f in health({"lanes": (4, 4)})] == ["ok", "ok"], "a GPU that has no more"


@pytest.mark.parametrize(
    ("number", "level", "words"),
    [(79, "fail", "fallen off the bus"), (31, "warn", "of a program"), (56, "warn", "odd")],
)
def test_errors_that_the_driver_logged_are_told_once_each(number, level, words):
    fault = health(xid=[("0000:02:00", number, "first"), ("0000:02:00", number, "odd")])[0]
    assert (fault.name, fault.level) == ("Xid errors", level)
    assert words in fault.found and "2 since the start" in fault.found and "0000:02:00" in fault.found


def test_a_pair_that_adds_up_only_without_peer_to_peer_names_the_variable():
    hangs = PairOutcome((0, 1), "no answer within 120 s", "")
    fault = health(gpu_pairs=[hangs])[-1]
    assert fault.level == "fail" and "GPU 0 and GPU 1" in fault.found
    assert "NCCL_P2P_DISABLE=1" in fault.remedy
    broken = health(gpu_pairs=[PairOutcome((0, 1), "no answer within 120 s", "exit code 1")])[-1]
    assert broken.level == "fail" and "NCCL_P2P_DISABLE" not in broken.remedy
