"""The planner counts a model's weights exactly, by group and by layer."""

import json

import pytest
import torch
from transformers import Idefics3Config, Idefics3ForConditionalGeneration
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig

from smolray.config import ConfigError, LoraConfig, ModelConfig, RunConfig
from smolray.model.adapters import prepare_for_training, trainable
from smolray.model.load import group_of
from smolray.model.tiny import SHAPES
from smolray.planner.model_files import known_shape, shape_of
from smolray.planner.shapes import VISION_DEFAULTS, ModelShape, Training

NAMES = sorted(SHAPES)


def config_of(name: str) -> Idefics3Config:
    spec, tied = SHAPES[name], bool(SHAPES[name].get("tied"))
    text = {
        **spec["text"],
        "model_type": "llama",
        "vocab_size": spec["vocab_size"] or 1000,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-5,
    }
    return Idefics3Config(
        vision_config=spec["vision"], text_config=text, scale_factor=spec["scale_factor"], tie_word_embeddings=tied
    )


@pytest.fixture(scope="module", params=NAMES)
def built(request):
    with torch.device("meta"):
        return request.param, Idefics3ForConditionalGeneration(config_of(request.param))


def layer_of(name: str) -> str:
    for prefix, kind in (("model.vision_model.encoder.layers.", "vision"), ("model.text_model.layers.", "text")):
        if name.startswith(prefix):
            return f"{kind}.{name.removeprefix(prefix).split('.')[0]}"
    if name.startswith("model.vision_model.embeddings"):
        return "vision_embeddings"
    return "head" if name.startswith(("lm_head", "model.text_model.norm")) else "merge"


def test_parameter_counts_match_the_model_by_group_and_layer(built):
    name, model = built
    shape = known_shape(name)
    by_group, by_layer = {}, {}
    for key, p in model.named_parameters():
        by_group[group_of(key)] = by_group.get(group_of(key), 0) + p.numel()
        by_layer[layer_of(key)] = by_layer.get(layer_of(key), 0) + p.numel()
    groups = shape.groups
    counted = {
        "vision": groups["vision"],
        "connector": groups["connector"],
        "text": groups["text"] + groups["embedding"] + groups["head"],
    }
    assert counted == by_group
    assert {layer.name: layer.parameters for layer in shape.layers} == by_layer
    assert shape.parameters == sum(p.numel() for p in model.parameters())


def test_a_config_file_says_the_same_as_the_name(built, tmp_path):
    name, model = built
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    assert shape_of(ModelConfig(path=str(tmp_path))) == known_shape(name)


@pytest.mark.parametrize("groups", [("text",), ("vision", "text"), ("vision", "connector", "text")])
def test_trained_parameters_are_those_of_peft(groups):
    with torch.device("meta"):
        model = Idefics3ForConditionalGeneration(config_of("random-256m"))
    config = RunConfig(
        model=ModelConfig(train=("connector",)), lora=LoraConfig(r=8, groups=groups, ranks={"text": 4}, use_dora=False)
    )
    shape, training = known_shape("random-256m"), Training.of(config)
    expected = sum(training.trained_parameters(layer) for layer in shape.layers)
    flat = RunConfig(model=ModelConfig(train=("connector",)), lora=LoraConfig(r=8, groups=groups))
    trained = trainable(prepare_for_training(model, flat))
    assert sum(Training.of(flat).trained_parameters(layer) for layer in shape.layers) == sum(
        p.numel() for p in trained.values()
    )
    assert expected < sum(p.numel() for p in trained.values()), "ranks.text = 4 halves the adapters of the text model"


def test_defaults_are_those_of_transformers():
    defaults = Idefics3VisionConfig()
    assert {key: getattr(defaults, key) for key in VISION_DEFAULTS} == VISION_DEFAULTS


def test_another_family_is_refused():
    with pytest.raises(ConfigError, match="llama"):
        ModelShape.from_config({"model_type": "llama"}, "a-llama")
