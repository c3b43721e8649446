"""The command line: clean messages, exit codes, and what it does to a run's folder."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from smolray import __version__
from smolray.cli import app as cli
from smolray.cli import config as config_commands
from smolray.cli import train as train_commands
from smolray.config import ConfigError, load_config, to_yaml
from smolray.run.folder import EVENTS

ROOT = Path(__file__).parents[3]


def smolray(*arguments, env=None):
    return CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "160", **(env or {})})


def refused(*arguments):
    """The message of a command that must end with code 2 and no traceback."""
    done = smolray(*arguments)
    assert done.exit_code == 2, done.output
    assert isinstance(done.exception, SystemExit)
    assert "Traceback" not in done.output
    return done.stderr


def append(run, **event):
    with (run / EVENTS).open("a") as file:
        file.write(json.dumps({"time": time.time(), "attempt": 1} | event) + "\n")


@pytest.fixture
def run(tmp_path):
    """A run that is under way at step 20 of 100."""
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(load_config(None, ["name=demo", "storage=/moved/elsewhere", "seed=5"])))
    append(folder, event="start", workers=2, total_steps=100)
    numbers = {"samples": 64, "tokens": 900, "seconds": 1.0, "data_wait_seconds": 0.1}
    for seconds, step in enumerate((10, 20)):
        append(folder, event="step", time=time.time() - 1 + seconds, step=step, loss=5 / step, **numbers)
    return folder


def test_config_show_prints_the_resolved_run_and_reads_it_back(tmp_path):
    shown = smolray("config", "show", "lora.r=4", "optimizer.learning_rate=3e-4")
    assert shown.exit_code == 0
    file = tmp_path / "run.yaml"
    file.write_text(shown.stdout)
    assert smolray("config", "show", "--config", str(file)).stdout == shown.stdout
    assert load_config(str(file)) == load_config(None, ["lora.r=4", "optimizer.learning_rate=3e-4"])


def test_config_schema_is_json():
    assert json.loads(smolray("config", "schema").stdout)["title"] == "RunConfig"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["config", "show", "engine.stage=9"], "engine.stage = 9"),
        (["config", "show", "-c", "absent.yaml"], "absent.yaml"),
        (["train", "model.train=[]"], "nothing would be trained"),
        (["prepare", "out=/tmp/x"], "data.train = ''"),
        (["plan", "--inventory", "2x rtx4091", "model.path=random-256m"], "rtx4090"),
        (["plan", "--measure", "--inventory", "2x rtx4090", "model.path=random-256m"], "give one of them"),
        (["tune", "name=x"], "search"),
        (["k8s", "render", "-c", "absent.yaml"], "absent.yaml"),
        (["status", "nope", "--storage", "{storage}"], "no run 'nope'"),
        (["logs", "nope", "--storage", "{storage}"], "there: demo"),
        (["export", "nope", "--storage", "{storage}"], "there: demo"),
        (["resume", "demo", "name=other", "--storage", "{storage}"], "keeps its name"),
        (["resume", "demo", "engine.stage=8", "--storage", "{storage}"], "engine.stage = 8"),
        (["status", "--storage", "s3://key:secret@host/runs"], "credentials"),
        (["status", "--storage", "ftp://host/runs"], "ftp://host/runs"),
        (["stop", "demo", "--storage", "{storage}", "--address", "head:8265"], "expected http://HEAD:8265"),
        (
            ["stop", "demo", "--storage", "{storage}", "--address", "http://127.0.0.1:9"],
            "no job server answers at http://127.0.0.1:9",
        ),
    ],
)
def test_an_error_is_one_message_and_code_2(run, arguments, told):
    assert told in refused(*[a.format(storage=run.parent) for a in arguments])
    assert not (run / "control").exists(), "a refused command changes nothing"


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


def test_markup_in_a_value_is_printed_as_it_is():
    assert "[red]x[/red][/nope]" in refused("config", "show", "model.dtype='[red]x[/red][/nope]'")


def test_debug_keeps_the_traceback_and_a_fault_of_ours_is_not_hidden(monkeypatch):
    assert isinstance(smolray("--debug", "config", "show", "seed=-1").exception, ConfigError)
    monkeypatch.setattr(config_commands, "to_yaml", lambda run: {}["a fault"])
    assert isinstance(smolray("config", "show").exception, KeyError)


def test_status_shows_all_runs_or_one(run):
    (run.parent / "shards").mkdir()
    everything = smolray("status", "--storage", str(run.parent)).stdout
    assert [line.split()[:3] for line in everything.splitlines()[1:]] == [["demo", "running", "20/100"]]
    one = smolray("status", "demo", env={"SMOLRAY_STORAGE": str(run.parent)}).stdout
    for part in ("0.2500", "64 samples/s", "900 tokens/s", "10 %", "8s"):
        assert part in one
    assert "no runs under" in smolray("status", "--storage", str(run / "empty")).stdout


def test_logs_render_events_and_follow_to_the_end(run):
    plain = smolray("logs", "demo", "--storage", str(run.parent)).stdout.splitlines()
    assert [line.split("  ")[0] for line in plain] == ["start", "step 10/100", "step 20/100"]

    def finish():
        time.sleep(0.7)
        append(run, event="end", status="finished", step=100, seconds=3)

    writer = threading.Thread(target=finish)
    writer.start()
    followed = smolray("logs", "demo", "--follow", "--storage", str(run.parent)).stdout.splitlines()
    writer.join()
    assert followed[:3] == plain
    assert followed[3].startswith("end     finished at step 100")


def loop_that_answers(run, seen):
    """What the training loop does: looks for the flag, saves, says so."""
    for _ in range(200):
        if (run / "control" / "stop").exists():
            seen.append(True)
            append(run, event="checkpoint", step=23, path="checkpoints/step-00000023")
            append(run, event="end", status="stopped", step=23, seconds=9)
            return
        time.sleep(0.05)


def test_stop_asks_waits_and_says_what_was_saved(run):
    seen = []
    loop = threading.Thread(target=loop_that_answers, args=(run, seen))
    loop.start()
    done = smolray("stop", "demo", "--wait", "20", "--storage", str(run.parent))
    loop.join()
    assert seen == [True]
    assert done.exit_code == 0
    assert "demo stopped at step 23, saved as checkpoints/step-00000023" in done.stdout
    assert not (run / "control" / "stop").exists(), "an answered request must not stop the next launch"
    again = smolray("stop", "demo", "--storage", str(run.parent))
    assert (again.exit_code, again.stdout) == (0, "demo has stopped already, at step 23\n")
    assert not (run / "control" / "stop").exists()


def test_a_stop_without_an_answer_fails_and_stays_asked(run):
    done = smolray("stop", "demo", "--wait", "0.3", "--storage", str(run.parent))
    assert done.exit_code == 1
    assert "has not stopped" in done.stderr
    assert (run / "control" / "stop").exists()
    assert "stop asked" in smolray("status", "--storage", str(run.parent)).stdout


def test_report_and_tensorboard_are_written(run):
    assert smolray("report", "demo", "--storage", str(run.parent)).exit_code == 0
    assert "Training loss" in (run / "report.html").read_text()
    done = smolray("tensorboard", "demo", "--out", str(run / "tb"), "--storage", str(run.parent))
    assert done.exit_code == 0
    assert len(list((run / "tb").iterdir())) == 1


def test_a_run_resumes_from_its_own_config_where_it_lies_now(run, monkeypatch):
    launched = []
    monkeypatch.setattr(train_commands, "launch", launched.append)
    (run / "control").mkdir()
    (run / "control" / "stop").touch()
    done = smolray("resume", "demo", "train.max_steps=7", "--storage", str(run.parent))
    assert done.exit_code == 0, done.output
    assert not (run / "control" / "stop").exists()
    assert (launched[0].seed, launched[0].train.max_steps, launched[0].run_dir) == (5, 7, str(run))


def every_command():
    """(words, command) of each command, groups included."""
    for name, command in typer.main.get_command(cli.app).commands.items():
        nested = getattr(command, "commands", {})
        yield from ((f"{name} {word}", inner) for word, inner in nested.items())
        if not nested:
            yield name, command


@pytest.mark.parametrize(("name", "command"), [pytest.param(*c, id=c[0]) for c in every_command()])
def test_every_command_is_described_in_one_line(name, command):
    first, _, rest = command.help.partition("\n")
    assert first.endswith(".") and len(first) <= 80 and not rest.strip("\n").startswith(" "), name
    assert not rest or rest.startswith("\n"), "a blank line ends the first line"
    for option in command.params:
        assert option.name == "help" or option.help, f"{name}: {option.name} is not described"


@pytest.mark.parametrize("module", ["smolray", "smolray.cli"])
def test_the_command_line_is_a_module_too(module):
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"smolray {__version__}\n", done.stderr


def test_env_shows_what_a_bug_report_needs():
    shown = smolray("env").stdout
    facts = json.loads(smolray("env", "--json").stdout)
    assert facts["smolray"] == __version__ and facts["packages"]["torch"] in shown
    assert {"python", "platform", "NVIDIA driver", "CUDA of torch", "gpus"} <= facts.keys()
    assert "pytest" not in facts["packages"], "what a developer needs is left out"


def test_a_mistyped_command_is_answered_with_the_nearest():
    done = smolray("tran")
    assert done.exit_code == 2 and "train" in done.stderr


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
