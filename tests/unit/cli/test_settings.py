"""Settings as people type them for other trainers: a YAML file first, `--key value`, TRL's names."""

import pytest
import yaml

from smolray.cli.settings import settings_as_words
from smolray.config import ConfigError, load_config
from tests.commands import smolray

OPTIONS = {"--config": True, "-c": True, "--follow": False, "--storage": True, "--help": False}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("run.yaml a.b=1", "--config run.yaml a.b=1"),
        ("vqa_lora", "--config vqa_lora"),
        ("--config run.yaml --train.max_steps 5", "--config run.yaml train.max_steps=5"),
        ("--train.max_steps=5 --train.audit --seed 3", "train.max_steps=5 train.audit=true seed=3"),
        ("--learning-rate 1e-4", "learning_rate=1e-4"),
        ("--train.max_steps -1", "train.max_steps=-1"),
        ("my-run --follow --storage out a=1", "my-run --follow --storage out a=1"),
        ("data.train=some.yaml", "data.train=some.yaml"),
        ("-- --a b", "-- --a b"),
        ("--a", "a=true"),
    ],
)
def test_words_become_options_and_settings(given, words):
    assert settings_as_words(given.split(), OPTIONS) == words.split()


def test_a_file_and_dashed_settings_are_read(tmp_path):
    (tmp_path / "run.yaml").write_text("name: mine\ntrain: {max_steps: 3}\n")
    file = str(tmp_path / "run.yaml")
    done = smolray("config", "show", file, "--optimizer.learning_rate", "0.002", "--train.audit", "--output_dir", "out")
    assert done.exit_code == 0, done.output
    shown = yaml.safe_load(done.output)
    assert (shown["name"], shown["storage"], shown["train"]["max_steps"]) == ("mine", "out", 3)
    assert (shown["optimizer"]["learning_rate"], shown["train"]["audit"]) == (0.002, True)


def test_an_unknown_option_is_refused_as_a_setting():
    done = smolray("config", "show", "--confg", "run.yaml")
    assert done.exit_code == 2 and "confg = 'run.yaml': not a setting" in done.output


def test_names_of_trl_stand_for_ours(tmp_path):
    (tmp_path / "run.yaml").write_text("model_name_or_path: tiny\nmax_length: 512\ndata: {prompt: Hi}\n")
    run = load_config(str(tmp_path / "run.yaml"), ["dataset_name=x", "run_name=other"])
    assert (run.model.path, run.data.max_length, run.data.prompt) == ("tiny", 512, "Hi")
    assert (run.data.train, run.name) == ("x", "other")


@pytest.mark.parametrize("text", ["run_name: a\nname: b", "model_name_or_path: tiny\nmodel: {path: tiny}"])
def test_a_name_of_trl_beside_ours_is_refused(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match="and both are given"):
        load_config(str(tmp_path / "run.yaml"))
