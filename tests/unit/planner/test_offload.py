"""What is offloaded needs main memory and crosses PCIe: both are planned."""

from dataclasses import replace

import pytest

from smolray.config import LoraConfig
from smolray.planner import assumptions as a
from smolray.planner.gpus import KNOWN_GPUS
from smolray.planner.inventory import GIB, PCIE, Inventory, InventoryNode, load
from smolray.planner.memory import Zero, host_bytes, zero_memory
from smolray.planner.shapes import Training
from tests.unit.planner.test_plan import SHAPES, plan_of, work_of


def node_of(gb: float | None, gpus: int = 2) -> Inventory:
    memory = None if gb is None else gb * GIB
    return Inventory((InventoryNode("node0", (KNOWN_GPUS["rtx3090"],) * gpus, PCIE, memory=memory),))


def test_an_offloaded_parameter_takes_18_bytes_of_main_memory():
    work = work_of("random-2.2b")
    trained = work.trained_parameters
    assert host_bytes(work, Zero(2, 4, offload_optimizer=True)) == 18 * trained / 4
    assert host_bytes(work, Zero(3, 4, True, True)) == (18 * trained + work.weight_bytes) / 4
    assert host_bytes(work, Zero(3, 4)) == 0


def test_offload_does_not_fit_where_the_node_lacks_main_memory():
    ample, scarce, unknown = (plan_of(node_of(gb), "random-2.2b") for gb in (128, 16, None))
    fits = {row.name for row in ample.rows if row.fits}
    assert any("offloaded" in name for name in fits)
    assert fits == {row.name for row in unknown.rows if row.fits}, "a node whose memory is not known has no limit"
    offloaded = [row for row in scarce.rows if "offloaded" in row.name]
    assert offloaded and not any(row.fits for row in offloaded)
    assert all("main memory" in row.limit for row in offloaded if row.zero.stage == 3)


def test_an_inventory_names_the_main_memory_of_a_node():
    assert load("nodes: [{gpus: rtx3090, memory_gb: 64}]").nodes[0].memory == 64 * GIB
    assert load("nodes: [{gpus: rtx3090}]").nodes[0].memory is None


def test_a_step_moves_6_bytes_of_an_offloaded_parameter_over_pcie():
    plan = plan_of(node_of(None, 1), "random-256m", "resources.num_workers=1")
    row = next(row for row in plan.rows if row.zero and row.zero.offload_optimizer and not row.zero.offload_param)
    trained = SHAPES["random-256m"].parameters
    assert row.time.optimizer == pytest.approx(trained / a.CPU_ADAM_PARAMETERS + 6 * trained / a.PCIE_BYTES)


def test_stage_0_in_16_bit_holds_fp32_copies_and_converts_gradients_in_their_place():
    work = work_of()
    trained, weights = work.trained_parameters, work.weight_bytes
    memory = zero_memory(work, Zero(0, 1))
    assert (memory.weights, memory.gradients, memory.optimizer) == (weights, 2 * trained, 12 * trained)
    assert memory.step == 2 * trained, "fp32 gradients take the place of 16-bit ones"
    plain = zero_memory(replace(work, training=replace(work.training, dtype="float32")), Zero(0, 1))
    assert (plain.gradients, plain.optimizer, plain.step) == (4 * trained, 8 * trained, 0)


def test_adapters_are_16_bit_under_zero_and_fp32_in_a_pipeline():
    lora = LoraConfig(r=8)
    in_zero = work_of("random-2.2b", Training(frozenset(), lora, "bfloat16", fp32_adapters=False))
    in_pipeline = work_of("random-2.2b", Training(frozenset(), lora, "bfloat16"))
    assert (in_zero.training.trained_bytes, in_pipeline.training.trained_bytes) == (2, 4)
    adapters = in_zero.trained_parameters
    assert in_pipeline.weight_bytes - in_zero.weight_bytes == 2 * adapters
    assert sum(kept.saved for kept in in_zero.kept) < sum(kept.saved for kept in in_pipeline.kept)
    plan = plan_of("2x rtx3090", "random-2.2b", "lora.r=8", "model.train=[]")
    zero = next(row for row in plan.rows if row.strategy == "zero-2" and not row.zero.offload_optimizer)
    assert zero.memory[0].gradients == 2 * adapters
