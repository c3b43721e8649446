"""Commands as a person runs them, and a run whose folder they read."""

import json
import time

from typer.testing import CliRunner

from smolray.cli.app import app
from smolray.config import load_config, to_yaml
from smolray.run.folder import EVENTS


def smolray(*arguments, env=None):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "160", **(env or {})})


def refused(*arguments):
    """The message of a command that must end with code 2 and no traceback."""
    done = smolray(*arguments)
    assert done.exit_code == 2, done.output
    assert isinstance(done.exception, SystemExit)
    assert "Traceback" not in done.output
    return done.stderr


def append(run, **event):
    """Write one event into the folder of a run."""
    with (run / EVENTS).open("a") as file:
        file.write(json.dumps({"time": time.time(), "attempt": 1} | event) + "\n")


def write_run(parent):
    """A run called demo that is under way at step 20 of 100."""
    folder = parent / "demo"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(load_config(None, ["name=demo", "storage=/moved/elsewhere", "seed=5"])))
    append(folder, event="start", workers=2, total_steps=100)
    numbers = {"samples": 64, "tokens": 900, "seconds": 1.0, "data_wait_seconds": 0.1}
    for seconds, step in enumerate((10, 20)):
        append(folder, event="step", time=time.time() - 1 + seconds, step=step, loss=5 / step, **numbers)
    return folder
