"""Where GPUs stay idle the plan says what would make them pay, with the speed that it brings."""

from smolray.planner.describe import to_json, words
from smolray.planner.idle import idle_gpus, remedies
from tests.unit.planner.test_plan import config_of, plan_of

QLORA = ("lora.r=8", "model.train=[]", "model.load_in_4bit=true")
UNEQUAL = "2x rtx4090 @ 10GbE, 1x rtx3090 @ 1GbE, 1x rtx3060 @ 1GbE"


def test_a_larger_step_a_faster_network_and_another_engine_are_named_with_their_speed():
    plan = plan_of(UNEQUAL, "random-2.2b", *QLORA)
    assert idle_gpus(plan) == ((1, 0), (2, 0))
    found = remedies(plan)
    step, network, engine = found
    assert list(step.settings) == ["train.global_batch"] and len(step.candidate.gpus) == 4
    assert step.candidate.samples_per_second > plan.chosen.samples_per_second
    assert "GbE" in network.words and not network.settings
    assert len(engine.candidate.gpus) == 4 and engine.candidate.name in engine.words
    said = words(plan)
    for remedy in found:
        assert f"With {remedy.words}: {remedy.candidate.samples_per_second:.1f} samples/s" in said
    assert [r["settings"] for r in to_json(plan)["remedies"]] == [step.settings, {}, {}]


def test_a_remedy_is_what_is_planned_once_it_is_made():
    before = plan_of(UNEQUAL, "random-2.2b", *QLORA)
    batch = remedies(before)[0].settings["train.global_batch"]
    after = plan_of(UNEQUAL, "random-2.2b", *QLORA, f"train.global_batch={batch}")
    assert after.chosen.samples_per_second == remedies(before)[0].candidate.samples_per_second
    assert batch % config_of("random-2.2b", *QLORA).global_batch == 0


def test_over_a_slow_network_a_faster_one_makes_the_other_node_pay():
    plan = plan_of("1x rtx4090 @ 100Mbit, 1x rtx4090 @ 100Mbit", "random-256m", "train.global_batch=32")
    assert len(plan.chosen.gpus) == 1
    network = next(remedy for remedy in remedies(plan) if "GbE" in remedy.words)
    assert network.words == "a network of 10GbE between all nodes" and len(network.candidate.gpus) == 2
    assert network.candidate.samples_per_second > 1.5 * plan.chosen.samples_per_second


def test_where_no_gpu_is_idle_nothing_is_said():
    plan = plan_of("2x rtx3090", "random-256m", "train.global_batch=32")
    assert idle_gpus(plan) == () and remedies(plan) == [] and "Left idle" not in words(plan)
