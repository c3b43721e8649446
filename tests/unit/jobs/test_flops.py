"""The limits of the benchmark are those of the arithmetic: operations counted by hand, and by torch."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Idefics3ForConditionalGeneration

from jobs.bench.flops import Work
from jobs.bench.timing import Cost, Result
from smolray.config import load_config
from smolray.planner.model_files import known_shape
from smolray.planner.statistics import DataStatistics, Row
from tests.unit.planner.test_shapes import config_of

FROZEN = ("model.train=[text]", "model.vision_features=precompute")


def work(shape: str, questions: tuple[int, ...], *settings: str) -> Work:
    """Images of 5 tiles, with questions of 20 tokens and answers of 4."""
    sizes = known_shape(shape)
    prefix = 8 + round(5 * sizes.tokens_with_marks)
    rows = tuple(Row(5, prefix, (prefix + 24,) * count, (4,) * count) for count in questions)
    return Work(load_config(None, settings), sizes, DataStatistics(rows, prefix + 24 * max(questions), 5), 16)


@pytest.mark.parametrize(
    ("shape", "everything", "ready"),
    [("random-256m", 5.3, 23.0), ("random-500m", 5.2, 10.8), ("random-2.2b", 5.1, 7.9)],
)
def test_limits_of_true_shapes_are_those_of_the_arithmetic(shape, everything, ready):
    """5.4 questions an image, as VQAv2 has them."""
    several = (3, 4, 5, 6, 9)
    for settings, expected in (((), everything), (FROZEN, ready)):
        one = work(shape, several, *settings)
        assert one.separate / one.training == pytest.approx(expected, rel=0.15)


def test_one_question_an_image_saves_nothing_but_what_is_read():
    one = work("random-256m", (1,), "model.vision_features=compute")
    assert one.separate == pytest.approx(one.training, rel=0.01)


def test_a_conversation_takes_the_operations_that_torch_counts():
    one, config = work("random-30m", (1,), "model.vision_features=compute"), config_of("random-30m")
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = 2
    model, side, length = Idefics3ForConditionalGeneration(config), 256, one.data.rows[0].lengths[0]
    tower, pixels, seen = model.model.vision_model, torch.zeros(5, 3, side, side), torch.ones(5, 16, 16).bool()
    with FlopCounterMode(display=False) as counter:
        states = tower.encoder(inputs_embeds=tower.embeddings(pixels, seen)).last_hidden_state
        features = model.model.connector(tower.post_layernorm(states))
        embeds = torch.zeros(1, length, one.shape.text.hidden, requires_grad=True)
        hidden = model.model.text_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        (model.lm_head(hidden[0, :4]).sum() + features.sum()).backward()

    vision, text = (replace(part, num_layers=2) for part in (one.shape.vision, one.shape.text))
    small = replace(one, shape=replace(one.shape, vision=vision, text=text))
    assert small.training == pytest.approx(counter.get_total_flops(), rel=0.1)


@pytest.mark.parametrize(
    ("shape", "several", "single"),
    [("random-256m", 2.23, 2.35), ("random-500m", 1.73, 1.85), ("random-2.2b", 1.48, 1.56)],
)
def test_what_features_written_once_can_save_over_three_epochs_of_adapters(shape, several, single):
    """The figures of jobs/README.md."""
    for questions, expected in (((3, 4, 5, 6, 9), several), ((1,), single)):
        assert work(shape, questions, "model.train=[]", "lora={r: 8}").once(3) == pytest.approx(expected, abs=0.01)


def test_a_limit_stands_beside_what_was_measured():
    ours, theirs = [Cost(cpu_s=2.0)], [Cost(cpu_s=6.0)]
    told = Result("r", "what", 1, "step", "peer", ours, theirs, "cpu", 1e12, 4e12).to_json()
    assert (told["ratio"], told["limit"], told["share_of_limit"]) == (3.0, 4.0, 0.75)
    assert Result("r", "what", 1, "step", "peer", ours, theirs, "cpu").to_json()["limit"] is None
