"""Compiled layers and Liger's kernels: which modules get them, and where they are refused."""

import copy
from importlib.util import find_spec

import pytest
import torch
from torch._dynamo.utils import counters

from smolray.config import ConfigError, ModelConfig, load_config
from smolray.data.collate import Group, collate_prompts
from smolray.model.decoding import greedy
from smolray.model.forward import tile_features
from smolray.model.kernels import check_kernels, compile_layers, use_kernels
from smolray.model.load import load_model
from smolray.model.parts import drop_submodules
from smolray.train.setup import check_device
from tests.offline import asked, encoder_of, picture, shard_row


@pytest.fixture
def model(tiny_path):
    return load_model(ModelConfig(path=tiny_path, dtype="float32"))


def compiled(model):
    """The names of the modules that are compiled on their next call."""
    return {name for name, module in model.named_modules() if module._compiled_call_impl is not None}


def layers_of(model):
    """The names of all layers, and of the parts of the last text layer."""
    number = model.config.text_config.num_hidden_layers
    names = {f"model.text_model.layers.{i}" for i in range(number)}
    names |= {f"model.vision_model.encoder.layers.{i}" for i in range(model.config.vision_config.num_hidden_layers)}
    parts = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
    return names | {f"model.text_model.layers.{number - 1}.{part}" for part in parts}


def test_every_layer_is_compiled_and_nothing_else(model):
    names = set(model.state_dict())
    assert use_kernels(model, ModelConfig()) is model and not compiled(model), "off by default"
    use_kernels(model, ModelConfig(compile=True))
    assert compiled(model) == layers_of(model)
    assert set(model.state_dict()) == names, "weights keep their names"
    assert not compiled(copy.deepcopy(model)), "a copy is compiled by who makes it (objectives/reference.py)"


def test_a_model_without_its_tower_compiles_its_text_layers(model):
    compile_layers(drop_submodules(model, ("vision", "connector")))
    assert compiled(model) == {name for name in layers_of(model) if "text_model" in name}


def test_compiled_layers_of_the_tower_are_given_tiles_in_the_order_of_their_dimensions(model):
    """From a transposed input Inductor makes a wrong backward pass (tests/recipes/test_compile.py)."""
    compile_layers(model)
    seen = []
    first = model.model.vision_model.encoder.layers[0]
    first.layer_norm1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].is_contiguous()))
    with torch.compiler.set_stance("force_eager"):
        for tiles in (1, 2):
            tile_features(model, torch.zeros(tiles, 3, 64, 64, dtype=torch.uint8))
    assert seen == [True, True]


def test_decoding_compiles_nothing(model, processor):
    encoder = encoder_of(processor, {"longest_edge": 64}, packing="image")
    row = shard_row([picture(64, 64)], asked("what shape?", "circle"))
    batch = collate_prompts([Group(row, (0,))], encoder)
    wanted = greedy(model, batch, 6, {0})
    compile_layers(model)
    counters.clear()
    assert greedy(model, batch, 6, {0}) == wanted
    assert not counters["stats"]


def test_liger_is_refused_on_a_cpu():
    with pytest.raises(ConfigError, match=r"needs a CUDA device .*nearest: model.use_liger_kernel=false"):
        check_device(load_config(None, ["model.use_liger_kernel=true"]), torch.device("cpu"))
    check_device(load_config(None, ["model.compile=true"]), torch.device("cpu"))


@pytest.mark.skipif(find_spec("liger_kernel") is not None, reason="liger-kernel is installed here")
def test_without_its_package_liger_is_refused_with_what_to_install():
    with pytest.raises(ConfigError, match=r"not installed here: pip install 'smolray\[liger\]'"):
        check_kernels(ModelConfig(use_liger_kernel=True), torch.device("cuda", 0))
