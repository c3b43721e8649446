"""A search space is held against the run's own types and limits before any trial starts, and what is drawn from it is a
run that validates.
"""

import random

import pytest

from smolray.config import ConfigError, load_config
from smolray.tune.space import combinations, longest, read_space, total_trials, trial_run

BASE = {"data": {"train": "a", "validation": "b"}, "lora": {"r": 8}, "model": {"train": []}}


def space_of(space, **search):
    return read_space(load_config(None, base={**BASE, "search": {"space": space, **search}}))


def refused(space, **search):
    with pytest.raises(ConfigError) as raised:
        space_of(space, **search)
    return str(raised.value)


def test_what_is_drawn_is_a_run_that_validates():
    config = load_config(None, base={**BASE, "search": {}})
    space, rng = read_space(config), random.Random(0)
    assert {"optimizer.learning_rate", "train.num_train_epochs", "lora.r", "image.longest_edge"} <= set(space), (
        "the published recipe"
    )
    for _ in range(50):
        settings = {key: domain.sample(rng) for key, domain in space.items()}
        run = trial_run(config, settings)
        assert run.search is None and 2e-5 <= run.optimizer.learning_rate <= 5e-4
        assert run.lora.r == settings["lora.r"] and run.train.num_train_epochs in (3, 4, 5)


@pytest.mark.parametrize(
    ("space", "told"),
    [
        (
            {"optimizer.learning_rat": {"loguniform": [1e-5, 1e-3]}},
            ["search.space.optimizer.learning_rat", "did you mean optimizer.learning_rate"],
        ),
        ({"optimizr.learning_rate": {"loguniform": [1e-5, 1e-3]}}, ["search.space.optimizr.learning_rate", "optimizr"]),
        (
            {"optimizer.learning_rate": {"loguniforn": [1e-5, 1e-3]}},
            ["search.space.optimizer.learning_rate", "nearest: loguniform"],
        ),
        ({"optimizer.learning_rate": {"loguniform": [1e-3, 1e-5]}}, ["search.space.optimizer.learning_rate", "empty"]),
        ({"optimizer.learning_rate": {"loguniform": [1e-3, 1e-3]}}, ["search.space.optimizer.learning_rate", "empty"]),
        (
            {"optimizer.learning_rate": {"loguniform": [0, 1e-3]}},
            ["search.space.optimizer.learning_rate", "nearest: uniform"],
        ),
        (
            {"optimizer.learning_rate": {"uniform": [-1, 1e-3]}},
            ["search.space.optimizer.learning_rate", "greater than or equal to 0"],
        ),
        (
            {"optimizer.learning_rate": {"uniform": ["low", "high"]}},
            ["search.space.optimizer.learning_rate", "two numbers"],
        ),
        ({"optimizer.learning_rate": {"uniform": [1e-5]}}, ["search.space.optimizer.learning_rate", "two numbers"]),
        ({"optimizer.learning_rate": {"choice": []}}, ["search.space.optimizer.learning_rate", "at least one"]),
        ({"optimizer.learning_rate": {"choice": [1e-3, "fast"]}}, ["search.space.optimizer.learning_rate", "fast"]),
        ({"optimizer.learning_rate": {"choice": [1e-3, "1e-3"]}}, ["search.space.optimizer.learning_rate", "twice"]),
        ({"optimizer.learning_rate": {}}, ["search.space.optimizer.learning_rate", "one kind"]),
        ({"lora.lora_dropout": {"uniform": [0, 1]}}, ["search.space.lora.lora_dropout", "less than 1"]),
        (
            {"train.num_train_epochs": {"uniform": [1, 3]}},
            ["search.space.train.num_train_epochs", "nearest: {int: [1, 3]}"],
        ),
        ({"train.num_train_epochs": {"int": [0, 3]}}, ["search.space.train.num_train_epochs", "nearest: 1"]),
        ({"train.num_train_epochs": {"int": [1.5, 3]}}, ["search.space.train.num_train_epochs", "whole"]),
        ({"model.dtype": {"uniform": [0, 1]}}, ["search.space.model.dtype"]),
        ({"model.dtype": {"choice": ["bfloat16", "fp8"]}}, ["search.space.model.dtype", "fp8"]),
        ({"name": {"choice": ["a", "b"]}}, ["search.space.name", "same for all"]),
        ({"resources.num_workers": {"choice": [1, 2]}}, ["search.space.resources.num_workers", "same for all"]),
        (
            {"engine.stage": {"choice": [2, 3]}, "model.load_in_4bit": {"choice": [True, False]}},
            ["engine.stage=3, model.load_in_4bit=True", "ZeRO-3"],
        ),
    ],
)
def test_a_space_with_a_fault_is_refused_with_the_key(space, told):
    message = refused(space)
    assert all(part in message for part in told), message


def test_every_key_at_fault_is_named_at_once():
    message = refused(
        {
            "optimizer.learning_rate": {"uniform": [1, 0]},
            "lora.r": {"int": [0, 8]},
            "train.num_train_epochs": {"int": [1, 2]},
        }
    )
    assert len(message.splitlines()) == 2 and "learning_rate" in message and "lora.r" in message


def test_the_algorithm_must_be_able_to_use_the_space():
    ranges = {"optimizer.learning_rate": {"loguniform": [1e-5, 1e-3]}}
    assert "search.algorithm = grid" in refused(ranges, algorithm="grid")
    assert "nearest: {choice: [0.001]}" in refused({"optimizer.learning_rate": {"grid": [1e-3]}}, algorithm="optuna")
    assert "pbt changes settings" in refused({"lora.r": {"choice": [4, 8]}}, scheduler="pbt", algorithm="random")
    assert "algorithm=random" in refused(ranges, scheduler="pbt")
    assert "only optuna" in refused(ranges, algorithm="random", second_objective="memory")
    with pytest.raises(ConfigError, match=r"data\.validation"):
        read_space(load_config(None, base={"data": {"train": "a"}, "search": {"space": ranges}}))


def test_what_only_shapes_the_shards_is_no_setting_to_search():
    for key, values in (("prompt", ["a", "b"]), ("columns.answer", ["a", "b"]), ("shard_bytes", [2**20, 2**22])):
        assert "written once for all trials" in refused({f"data.{key}": {"choice": values}})
    assert space_of({"data.max_length": {"choice": [512, 1024]}}), "read by each trial"


@pytest.mark.parametrize("engine", ["trl", "auto"])
def test_a_population_needs_an_engine_that_takes_over_weights(engine):
    search = {
        "space": {"optimizer.learning_rate": {"loguniform": [1e-5, 1e-3]}},
        "scheduler": "pbt",
        "algorithm": "random",
    }
    with pytest.raises(
        ConfigError, match=rf"engine\.name = {engine} with search\.scheduler = pbt.*nearest: engine\.name=zero"
    ):
        read_space(
            load_config(None, base={**BASE, "image": {"upscale": True}, "engine": {"name": engine}, "search": search})
        )


def test_numbers_may_be_written_as_yaml_reads_them():
    space = space_of(
        {"optimizer.learning_rate": {"loguniform": ["2e-5", "5e-4"]}, "optimizer.weight_decay": {"choice": ["1e-2", 0]}}
    )
    assert space["optimizer.learning_rate"].low == 2e-5 and space["optimizer.weight_decay"].values == (0.01, 0.0)


def test_a_grid_counts_every_combination():
    lists = {"optimizer.learning_rate": {"grid": [1e-4, 1e-3]}, "lora.r": {"choice": [4, 8, 16]}}
    grid = load_config(None, base={**BASE, "search": {"space": lists, "algorithm": "grid"}})
    assert total_trials(grid, read_space(grid)) == 6
    mixed = load_config(None, base={**BASE, "search": {"space": lists, "algorithm": "random", "num_samples": 5}})
    assert total_trials(mixed, read_space(mixed)) == 10 and len(combinations(read_space(mixed))) == 2


def test_rungs_reach_to_the_longest_trial():
    config = load_config(
        None,
        base={**BASE, "search": {"space": {"train.num_train_epochs": {"int": [2, 5]}}}, "evaluate": {"eval_epochs": 2}},
    )
    assert longest(config, read_space(config)) == 3


def test_the_search_that_is_shipped_is_one_that_can_run():
    config = load_config("tune_vqa", ["data.train=a", "data.validation=b"])
    assert longest(config, read_space(config)) == 5 and total_trials(config, read_space(config)) == 24
