"""The plan counts what an evaluation takes, and says how large its batches are."""

from dataclasses import replace

import pytest

from smolray.planner import assumptions as a
from smolray.planner.decoding import prompt_bytes, token_bytes
from smolray.planner.describe import to_json, words
from smolray.planner.evaluation import evaluation_batch
from smolray.planner.memory import Zero, zero_memory
from tests.unit.planner.test_plan import SHAPES, config_of, plan_of, work_of

VALIDATION = "data.validation=validation.parquet"
LORA = ("lora.r=8", "model.train=[]")


def test_a_prompt_token_of_the_2_2b_takes_its_keys_and_values_and_one_layers_work():
    text = SHAPES["random-2.2b"].text
    assert token_bytes(text, 2) == 2 * (2 * 24 * 32 * 64 + 8 * text.hidden + 3 * text.intermediate)


def test_the_longest_prompt_must_fit_beside_what_training_keeps():
    work = work_of("random-2.2b")
    plain, evaluated = (zero_memory(replace(work, prompt=prompt), Zero(1, 1)) for prompt in (0.0, 1e12))
    assert plain.evaluation == 0 and evaluated.evaluation == 1e12
    assert evaluated.total > 1e12 > plain.total and evaluated.largest == "evaluation"
    small = zero_memory(replace(work, prompt=1.0), Zero(1, 1))
    assert small.total == plain.total, "its memory is that of activations, which are gone by then"


def test_stage_3_gathers_all_weights_for_an_evaluation():
    work = replace(work_of("random-2.2b"), prompt=1e9)
    memory = zero_memory(work, Zero(3, 4, True, True))
    assert memory.evaluation == pytest.approx(1e9 + work.weight_bytes - a.LIVE_PARAMETERS * 2)


@pytest.mark.parametrize("inventory", ["1x rtx3090", "2x rtx3090", "1x rtx3060"])
def test_the_plan_says_how_many_of_the_longest_prompts_are_answered_together(inventory):
    plan = plan_of(inventory, "random-2.2b", *LORA, VALIDATION)
    chosen, longest = plan.chosen, plan.statistics.longest
    batch = evaluation_batch(chosen, plan.config, plan.shape, longest)
    each = token_bytes(plan.shape.text, 2)
    free = chosen.capacity[0] - chosen.memory[0].kept
    assert batch.tokens == pytest.approx(a.DECODING_SHARE * free / each, rel=0.01)
    assert batch.sequences == min(batch.tokens // longest, plan.config.evaluate.batch_size) >= 1
    assert f"answers {batch.sequences} sequences of {longest:,} tokens" in words(plan)
    assert to_json(plan)["evaluation"]["tokens"] == batch.tokens


def test_a_pipeline_borrows_the_other_stages_weights_for_an_evaluation():
    plan = plan_of("2x rtx3060", "random-500m", "engine.name=pipeline", VALIDATION)
    row = next(row for row in plan.rows if row.strategy == "pipeline")
    whole = sum(layer.parameters for layer in plan.shape.layers) * 2
    for memory in row.memory:
        assert memory.weights + memory.evaluation >= whole
    assert prompt_bytes(plan.config, plan.shape.text, 1000) > 0


def test_a_run_that_answers_nothing_plans_no_evaluation():
    for overrides in ((), (VALIDATION, "method=retrieval")):
        config = config_of("random-256m", *overrides)
        assert prompt_bytes(config, SHAPES["random-256m"].text, 1000) == 0
        plan = plan_of("1x rtx3090", "random-256m", *overrides)
        assert to_json(plan)["evaluation"] is None and "An evaluation" not in words(plan)


def test_pictures_that_are_held_out_are_evaluated_as_validation_data_are():
    named = to_json(plan_of("1x rtx3090", "random-2.2b", *LORA, VALIDATION))["evaluation"]
    held_out = to_json(plan_of("1x rtx3090", "random-2.2b", *LORA, "data.validation_fraction=0.1"))["evaluation"]
    assert named == held_out and held_out is not None
