"""Recipes are found by name, are valid, and say in their first line what they are for."""

import pytest
import yaml
from typer.testing import CliRunner

from smolray.cli.app import app
from smolray.config import ConfigError, load_config
from smolray.config.recipes import FOLDER, recipe_text, recipes

DATA = ["data.train=/data/train", "data.validation=/data/validation"]


@pytest.mark.parametrize("name", [path.stem for path in FOLDER.glob("*.yaml")])
def test_a_recipe_is_valid_and_described_in_one_line(name):
    run = load_config(name, DATA)
    assert run.data.train == "/data/train" and run.name.replace("-", "_") in (name, "vqa_search")
    assert len(recipes()[name]) < 105 and recipes()[name].endswith(".")


def test_a_file_of_the_same_name_goes_before_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("demo", DATA).name == "demo"
    (tmp_path / "demo").write_text("name: mine\n")
    assert load_config("demo", DATA).name == "mine"


def test_a_wrong_name_is_answered_with_the_nearest_recipe():
    with pytest.raises(ConfigError, match=r"neither a config file nor a recipe; .*nearest: vqa_lora$"):
        load_config("vqa_lorra", DATA)
    with pytest.raises(ConfigError, match="no recipe is called 'dpo'; recipes: demo, dpo_lora"):
        recipe_text("dpo")


def test_config_list_and_new_give_a_file_to_start_from(tmp_path):
    listed = CliRunner().invoke(app, ["config", "list"]).stdout.splitlines()
    assert [line.split()[0] for line in listed] == sorted(recipes())
    printed = CliRunner().invoke(app, ["config", "new", "vqa_lora"]).stdout
    (tmp_path / "run.yaml").write_text(printed)
    assert load_config(str(tmp_path / "run.yaml"), DATA) == load_config("vqa_lora", DATA)
    assert yaml.safe_load(printed)["lora"]["r"] == 8
    assert CliRunner().invoke(app, ["config", "new", "nothing"]).exit_code == 2
