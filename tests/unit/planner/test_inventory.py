"""What a person owns is read as they say it, and refused with the nearest that is known."""

import pytest

from smolray.planner.gpus import KNOWN_GPUS
from smolray.planner.inventory import (
    GIB,
    Interconnect,
    Inventory,
    InventoryError,
    find_gpu,
    find_network,
    load,
    measured_gpu,
    parse,
)

BOMB = "nodes:\n" + "".join(f"- &a{n} [{', '.join([f'*a{n - 1}'] * 9 if n else ['x'] * 9)}]\n" for n in range(30))


def test_one_line_describes_nodes_gpus_and_networks():
    inventory = parse("2x rtx4090 @ 10GbE, 1x rtx3060 + rtx3090")
    assert [[gpu.name for gpu in node.gpus] for node in inventory.nodes] == [
        ["rtx4090", "rtx4090"],
        ["rtx3060", "rtx3090"],
    ]
    assert [node.network.bandwidth for node in inventory.nodes] == [10e9 / 8, 1e9 / 8], (
        "a network that is not named is 1GbE"
    )
    assert parse(inventory.describe()) == inventory


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("4090", "rtx4090"),
        ("RTX 3060", "rtx3060"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("GeForce-RTX-3090", "rtx3090"),
        ("Tesla T4", "t4"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA L4", "l4"),
        ("RTX 4060 Ti 16GB", "rtx4060ti"),
        ("rtx 3060 12gb", "rtx3060"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000ada"),
    ],
)
def test_a_gpu_is_known_by_the_names_that_people_ray_and_torch_use(name, gpu):
    assert find_gpu(name).name == gpu


def test_the_table_holds_figures_of_the_right_size():
    for gpu in KNOWN_GPUS.values():
        assert 5 * GIB < gpu.memory < 145 * GIB
        assert 1 <= gpu.tflops_16 / gpu.tflops_32 <= 17, f"{gpu.name}: tensor cores are not slower than the others"
        assert 200e9 < gpu.bandwidth < 5000e9
        assert find_gpu(gpu.name) is gpu
    assert find_gpu("t4").tflops("bfloat16") == find_gpu("t4").tflops_32, "Turing has no bf16 units"


def test_yaml_describes_the_same_and_gpus_of_ones_own(tmp_path):
    file = tmp_path / "nodes.yaml"
    file.write_text("""
nodes:
  - {name: left, gpus: [2x rtx4090], network: 10GbE, cpus: 16}
  - name: right
    gpus: [{name: odd, memory_gb: 20, tflops_16: 50, tflops_32: 25, bandwidth_gb: 700}]
    network: {bandwidth_gbit: 2.5, latency_us: 50}
    internal: {bandwidth_gbit: 200}
""")
    inventory = load(str(file))
    left, right = inventory.nodes
    assert (left.name, len(left.gpus), left.cpus) == ("left", 2, 16)
    assert (right.gpus[0].memory, right.gpus[0].bandwidth, right.network) == (
        20 * GIB,
        700e9,
        Interconnect(2.5e9 / 8, 50e-6),
    )
    assert inventory.between(0, 1) == Interconnect(2.5e9 / 8, 100e-6), "the slower of the two counts"
    assert inventory.between(1, 1).bandwidth == 200e9 / 8
    assert load("boxes: [{cards: rtx3090}]").nodes[0].gpus == (find_gpu("rtx3090"),)


def test_a_measured_link_counts_before_the_network():
    inventory = parse("1x rtx3090 @ 10GbE, 1x rtx3090 @ 10GbE")
    slow = Interconnect(1e6, 1e-3)
    assert Inventory(inventory.nodes, {(1, 0): slow}).between(0, 1) == slow


def test_a_measured_gpu_keeps_its_speed_and_takes_what_is_known():
    gpu = measured_gpu("NVIDIA GeForce RTX 3090", 23 * GIB, 60.0, 30.0)
    assert (gpu.tflops_16, gpu.bandwidth, gpu.measured) == (60.0, KNOWN_GPUS["rtx3090"].bandwidth, True)
    assert measured_gpu("cpu", GIB, 0.1, 0.1).bandwidth == pytest.approx(4e9)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("2x rtx9090", ["'rtx9090'", "nearest: rtx"]),
        ("2x rtx4090 @ fast", ["'fast'", "10GbE"]),
        ("2x rtx4090 @", ["2x rtx4090 @"]),
        ("rtx4090,,rtx3090", ["part 2"]),
        ("", ["2x rtx4090 @ 10GbE"]),
        ("0x rtx4090", ["0x rtx4090"]),
        ("missing.yaml", ["missing.yaml", "does not exist"]),
        ("nodes: []", ["nodes: [{name, gpus, network}"]),
        ("nodes: [3]", ["nodes[0]", "3"]),
        ("nodes: [{gpus: rtx3090, netwrk: 1GbE}]", ["netwrk", "nearest: network"]),
        ("nodes: [{gpus: [{name: x, memory_gb: 3}]}]", ["lacks tflops_16, tflops_32"]),
        ("nodes: [{gpus: [{name: x, memory_gb: -3, tflops_16: 1, tflops_32: 1}]}]", ["memory_gb = -3"]),
        ("nodes: [{gpus: rtx3090, network: {speed: 3}}]", ["bandwidth_gbit"]),
        ("nodes: [", ["not valid YAML"]),
        ("nodes: " + "[" * 5000, ["not valid YAML"]),
        ("nodes: &a [*a]", ["not valid YAML"]),
        (BOMB, ["not valid YAML"]),
        ("nodes: [{gpus: rtx3090, cpus: .inf}]", ["cpus = inf"]),
        ("nodes: [{gpus: rtx3090, network: {bandwidth_gbit: .nan}}]", ["bandwidth_gbit = nan"]),
        ("999999999999x rtx4090", ["999999999999x rtx4090", "at most"]),
    ],
)
def test_what_cannot_be_read_is_named(source, said):
    with pytest.raises(InventoryError) as caught:
        load(source)
    assert all(part in str(caught.value) for part in said), caught.value


@pytest.mark.parametrize(
    ("text", "bits"), [("1GbE", 1e9), ("2.5 Gbit/s", 2.5e9), ("100Mbit/s", 1e8), ("10g", 1e10), ("100 mbps", 1e8)]
)
def test_networks_are_read(text, bits):
    assert find_network(text).bandwidth == bits / 8
