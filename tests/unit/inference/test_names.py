"""A name is a run or a model, or is told with what is there."""

import subprocess
import sys

import pytest

from smolray.config import ConfigError
from smolray.inference.names import find_run
from smolray.run.status import RunNotFoundError
from tests.commands import write_run

CALL = """
import sys
from typer.testing import CliRunner
from smolray.cli.app import app
done = CliRunner().invoke(app, sys.argv[1:])
print(done.exit_code, {"ray", "torch", "transformers"} & set(sys.modules) or "neither")
print(done.stderr)
"""


def test_a_run_is_found_by_its_name_and_by_its_folder(tmp_path):
    run = write_run(tmp_path)
    assert find_run(run.name, str(run.parent)) == find_run(str(run), "elsewhere") == str(run)


def test_what_transformers_may_know_is_no_run(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for name in (str(tmp_path), "HuggingFaceTB/SmolVLM-256M-Instruct"):
        assert find_run(name, str(tmp_path / "runs")) is None


def test_what_is_neither_is_named_with_what_is_there(tmp_path):
    run = write_run(tmp_path)
    with pytest.raises(RunNotFoundError, match=f"there: {run.name}"):
        find_run("nope", str(run.parent))
    folder = tmp_path / "empty"
    folder.mkdir()
    with pytest.raises(ConfigError, match="neither a run"):
        find_run(str(folder), str(run.parent))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds adapters alone"):
        find_run(str(folder), str(run.parent))


@pytest.mark.parametrize("command", [["generate", "nope", "a.png"], ["search", "build", "nope", "a.png", "--out", "i"]])
def test_a_mistyped_run_is_told_before_torch_is_loaded(tmp_path, command):
    arguments = [*command, "--storage", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", CALL, *arguments], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("2 neither"), done.stdout + done.stderr
    assert "no run 'nope'" in done.stdout
