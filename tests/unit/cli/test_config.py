"""The settings of a run are printed in full and read back."""

import json

import yaml

from smolray.config import load_config
from tests.commands import smolray


def test_config_show_prints_the_resolved_run_and_reads_it_back(tmp_path):
    shown = smolray("config", "show", "lora.r=4", "optimizer.learning_rate=3e-4")
    assert shown.exit_code == 0
    file = tmp_path / "run.yaml"
    file.write_text(shown.stdout)
    assert smolray("config", "show", "--config", str(file)).stdout == shown.stdout
    assert load_config(str(file)) == load_config(None, ["lora.r=4", "optimizer.learning_rate=3e-4"])


def test_the_options_of_a_run_are_those_of_its_yaml():
    """`config show` names every setting, so that a person can copy a line as an override."""
    shown = yaml.safe_load(smolray("config", "show").stdout)
    flat = [
        f"{section}.{key}={json.dumps(value)}"
        for section, part in shown.items()
        if isinstance(part, dict)
        for key, value in part.items()
    ]
    again = smolray("config", "show", *flat)
    assert again.exit_code == 0, again.output
    assert yaml.safe_load(again.stdout) == shown


def test_config_schema_is_json():
    assert json.loads(smolray("config", "schema").stdout)["title"] == "RunConfig"
