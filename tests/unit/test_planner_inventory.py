"""What a person owns is read as they say it, and refused with the nearest that is known."""

import pytest

from smolray.planner.inventory import (
    CARDS,
    GIB,
    Inventory,
    InventoryError,
    Link,
    find_card,
    find_network,
    load,
    measured_card,
    parse,
)


def test_one_line_describes_boxes_cards_and_networks():
    inventory = parse("2x rtx4090 @ 10GbE, 1x rtx3060 + rtx3090")
    assert [[card.name for card in box.cards] for box in inventory.boxes] == [
        ["rtx4090", "rtx4090"],
        ["rtx3060", "rtx3090"],
    ]
    assert [box.network.bandwidth for box in inventory.boxes] == [10e9 / 8, 1e9 / 8], (
        "a network that is not named is 1GbE"
    )
    assert parse(inventory.describe()) == inventory


@pytest.mark.parametrize(
    ("name", "card"),
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
def test_a_card_is_known_by_the_names_that_people_ray_and_torch_use(name, card):
    assert find_card(name).name == card


def test_the_table_holds_figures_of_the_right_size():
    for card in CARDS.values():
        assert 5 * GIB < card.memory < 145 * GIB
        assert 1 <= card.tflops_16 / card.tflops_32 <= 17, f"{card.name}: tensor cores are not slower than the others"
        assert 200e9 < card.bandwidth < 5000e9
        assert find_card(card.name) is card
    assert find_card("t4").tflops("bfloat16") == find_card("t4").tflops_32, "Turing has no bf16 units"


def test_yaml_describes_the_same_and_cards_of_ones_own(tmp_path):
    file = tmp_path / "boxes.yaml"
    file.write_text("""
boxes:
  - {name: left, cards: [2x rtx4090], network: 10GbE, cpus: 16}
  - name: right
    cards: [{name: odd, memory_gb: 20, tflops_16: 50, tflops_32: 25, bandwidth_gb: 700}]
    network: {bandwidth_gbit: 2.5, latency_us: 50}
    internal: {bandwidth_gbit: 200}
""")
    inventory = load(str(file))
    left, right = inventory.boxes
    assert (left.name, len(left.cards), left.cpus) == ("left", 2, 16)
    assert (right.cards[0].memory, right.cards[0].bandwidth, right.network) == (20 * GIB, 700e9, Link(2.5e9 / 8, 50e-6))
    assert inventory.between(0, 1) == Link(2.5e9 / 8, 100e-6), "the slower of the two counts"
    assert inventory.between(1, 1).bandwidth == 200e9 / 8
    assert load("boxes: [{cards: rtx3090}]").boxes[0].cards == (find_card("rtx3090"),)


def test_a_measured_link_counts_before_the_network():
    inventory = parse("1x rtx3090 @ 10GbE, 1x rtx3090 @ 10GbE")
    slow = Link(1e6, 1e-3)
    assert Inventory(inventory.boxes, {(1, 0): slow}).between(0, 1) == slow


def test_a_measured_card_keeps_its_speed_and_takes_what_is_known():
    card = measured_card("NVIDIA GeForce RTX 3090", 23 * GIB, 60.0, 30.0)
    assert (card.tflops_16, card.bandwidth, card.measured) == (60.0, CARDS["rtx3090"].bandwidth, True)
    assert measured_card("cpu", GIB, 0.1, 0.1).bandwidth == pytest.approx(4e9)


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
        ("boxes: []", ["boxes: [{name, cards, network}"]),
        ("boxes: [3]", ["boxes[0]", "3"]),
        ("boxes: [{cards: rtx3090, netwrk: 1GbE}]", ["netwrk", "nearest: network"]),
        ("boxes: [{cards: [{name: x, memory_gb: 3}]}]", ["lacks tflops_16, tflops_32"]),
        ("boxes: [{cards: [{name: x, memory_gb: -3, tflops_16: 1, tflops_32: 1}]}]", ["memory_gb = -3"]),
        ("boxes: [{cards: rtx3090, network: {speed: 3}}]", ["bandwidth_gbit"]),
        ("boxes: [", ["not valid YAML"]),
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
