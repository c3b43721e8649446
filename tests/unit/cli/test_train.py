"""A plan needs no GPU; a run resumes from its own settings."""

import json
import subprocess
import sys

import pytest

from smolray.cli import train as train_commands
from tests.commands import smolray

pytestmark = pytest.mark.seconds


def test_a_plan_says_what_fits_and_why(tmp_path):
    done = smolray(
        "plan",
        "--inventory",
        "2x rtx4090 @ 10GbE, 1x rtx3060",
        "model.path=random-256m",
        "--json",
        str(tmp_path / "plan.json"),
    )
    assert done.exit_code == 0, done.output
    assert "Chosen: " in done.stdout and "pipeline" in done.stdout
    assert json.loads((tmp_path / "plan.json").read_text())["settings"]["resources.num_workers"] >= 1


def test_a_run_resumes_from_its_own_config_where_it_lies_now(run, monkeypatch):
    launched = []
    monkeypatch.setattr(train_commands, "launch", launched.append)
    (run / "control").mkdir()
    (run / "control" / "stop").touch()
    done = smolray("resume", "demo", "train.max_steps=7", "--storage", str(run.parent))
    assert done.exit_code == 0, done.output
    assert not (run / "control" / "stop").exists()
    assert (launched[0].seed, launched[0].train.max_steps, launched[0].run_dir) == (5, 7, str(run))


def test_a_plan_for_raw_data_assumes_its_sizes_and_loads_no_model(tmp_path):
    (tmp_path / "raw.jsonl").write_text('{"image": "a.png", "question": "what?", "answer": "it"}\n')
    done = smolray("plan", "--inventory", "2x rtx4090", "model.path=random-256m", f"data.train={tmp_path}/raw.jsonl")
    assert done.exit_code == 0, done.output
    assert "not prepared and indexed yet" in done.stderr and "Chosen" in done.stdout


@pytest.mark.parametrize("command", ["prepare", "train", "tune"])
@pytest.mark.parametrize("part", ["train", "validation"])
def test_data_that_are_not_there_are_told_before_ray_starts(tmp_path, command, part):
    (tmp_path / "raw.jsonl").write_text('{"question": "what?", "answer": "it"}\n')
    paths = {"train": "raw.jsonl", "validation": "raw.jsonl"} | {part: "nothing.jsonl"}
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom smolray.cli.app import app\n"
        "done = CliRunner().invoke(app, sys.argv[1:])\n"
        "print(done.exit_code, {'ray', 'torch'} & set(sys.modules) or 'neither')\nprint(done.stderr)"
    )
    settings = [f"data.{name}={tmp_path}/{file}" for name, file in paths.items()] + [f"data.shards={tmp_path}/shards"]
    done = subprocess.run([sys.executable, "-c", code, command, *settings], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("2 neither"), done.stdout + done.stderr
    assert "nothing.jsonl does not exist; expected a file, a folder, a glob" in done.stdout
