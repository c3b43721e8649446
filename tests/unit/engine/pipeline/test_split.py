"""How a model is cut into stages, and what is refused."""

import itertools
import random
import shutil

import pytest
import torch

from smolray.config import ConfigError, load_config
from smolray.engine.pipeline.load import empty_model, fill
from smolray.engine.pipeline.parameters import placements_of
from smolray.engine.pipeline.split import Split, even_partition, layer_costs, layer_names, layer_of, split_of
from smolray.model.adapters import prepare_for_training
from smolray.model.load import load_model
from smolray.model.tiny import build_model


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(build_model("tiny", ["what color is it? red"], tmp_path_factory.mktemp("model") / "tiny"))


def prepared(path, *overrides):
    config = load_config(None, [f"model.path={path}", "model.dtype=float32", *overrides])
    return prepare_for_training(empty_model(config.model), config), config


def test_pipeline_layers_are_in_the_order_of_the_forward_pass(path):
    model, _ = prepared(path)
    assert layer_names(model) == (
        "vision_embeddings",
        "vision.0",
        "vision.1",
        "vision.2",
        "merge",
        "text.0",
        "text.1",
        "text.2",
        "head",
    )


def test_every_parameter_belongs_to_a_pipeline_layer(path):
    for overrides in ((), ("lora={r: 2, groups: [vision, connector, text]}", "model.train=[]")):
        config = load_config(None, [f"model.path={path}", "model.dtype=float32", *overrides])
        model = prepare_for_training(load_model(config.model), config)
        found = {layer_of(name) for name, _ in model.named_parameters(remove_duplicate=False)}
        assert found == set(layer_names(model))


def test_the_empty_model_is_the_loaded_one_without_its_weights(path):
    config = load_config(None, [f"model.path={path}", "model.dtype=bfloat16"])
    empty, loaded = empty_model(config.model), load_model(config.model)
    assert all(p.is_meta for p in empty.parameters())
    assert {n: (p.shape, p.dtype) for n, p in empty.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in loaded.named_parameters()
    }
    for (name, made), (other, read) in zip(empty.named_buffers(), loaded.named_buffers(), strict=True):
        assert name == other and torch.equal(made, read)
    for tower in ("vision_config", "text_config"):
        assert getattr(empty.config, tower)._attn_implementation == getattr(loaded.config, tower)._attn_implementation


def test_tied_embedding_and_head_have_two_owners(path):
    model, config = prepared(path, "engine.partition=[4,4,1]")
    owners = {placement.name: placement.stages for placement in placements_of(model, split_of(model, config, 3))}
    assert owners.pop("model.text_model.embed_tokens.weight") == (1, 2)
    assert set(owners.values()) == {(0,), (1,), (2,)}


def test_a_dropped_weight_comes_back_in_both_its_places(path):
    model, _ = prepared(path)
    placement = next(
        s for s in placements_of(model, Split(layer_names(model), (9,))) if s.name.endswith("embed_tokens.weight")
    )
    placement.put(torch.ones(placement.parameter.shape))
    assert model.lm_head.weight is model.model.text_model.embed_tokens.weight and not model.lm_head.weight.is_meta
    placement.drop()
    assert model.lm_head.weight is model.model.text_model.embed_tokens.weight and model.lm_head.weight.is_meta
    assert placement.parameter.requires_grad


def test_the_even_partition_is_the_best_of_all_partitions():
    rng = random.Random(0)
    for _ in range(200):
        costs, stages = tuple(rng.random() for _ in range(rng.randint(3, 9))), rng.randint(1, 3)
        found = even_partition(costs, stages)
        assert sum(found) == len(costs) and len(found) == stages and min(found) >= 1

        def worst(partition, costs=costs):
            ends = list(itertools.accumulate(partition))
            return max(sum(costs[end - size : end]) for end, size in zip(ends, partition, strict=True))

        partitions = (
            tuple(b - a for a, b in itertools.pairwise((0, *ends, len(costs))))
            for ends in itertools.combinations(range(1, len(costs)), stages - 1)
        )
        assert worst(found) == pytest.approx(min(worst(partition) for partition in partitions))


def test_frozen_layers_cost_only_their_forward_pass(path):
    whole, frozen = (
        layer_costs(model, layer_names(model)) for model in (prepared(path)[0], prepared(path, "model.train=[text]")[0])
    )
    assert whole[1] == pytest.approx(3 * frozen[1]) and whole[5] == pytest.approx(frozen[5])


@pytest.mark.parametrize(
    ("overrides", "workers", "said"),
    [
        (["engine.partition=[4,4]"], 2, "add up to 9 layers"),
        (["engine.partition=[4,5]"], 3, "engine.pipeline_stages = 2 on 3 workers"),
        (["engine.pipeline_stages=3", "engine.partition=[4,5]"], 3, "expected 3 numbers"),
        ([], 10, "the model has 9 layers"),
    ],
)
def test_a_partition_that_does_not_fit_is_refused_with_the_numbers(path, overrides, workers, said):
    model, config = prepared(path, *overrides)
    with pytest.raises(ConfigError, match=said):
        split_of(model, config, workers)


def test_one_stage_for_each_worker_unless_the_partition_differs(path):
    model, config = prepared(path)
    assert split_of(model, config, 4).stages == 4
    model, config = prepared(path, "engine.partition=[4,5]")
    assert split_of(model, config, 4).stages == 2


def test_a_stage_reads_only_its_own_tensors_from_several_files(path, tmp_path):
    shutil.copytree(path, tmp_path, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    load_model(load_config(None, [f"model.path={path}", "model.dtype=float32"]).model).save_pretrained(
        tmp_path, max_shard_size="500KB"
    )
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model, config = prepared(str(tmp_path), "engine.partition=[2,7]")
    placements = placements_of(model, split_of(model, config, 2))
    mine = [placement for placement in placements if 0 in placement.stages]
    fill(placements, 0, config.model)
    whole = dict(load_model(config.model).named_parameters())
    real = {name: p for name, p in model.named_parameters() if not p.is_meta}
    assert {layer_of(name) for name in real} == {"vision_embeddings", "vision.0"} and real.keys() == {
        placement.name for placement in mine
    }
    assert all(torch.equal(p, whole[name]) for name, p in real.items())
