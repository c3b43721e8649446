"""The real libraries, read back: each has the whole run, and after a resume the same run goes on."""

import json
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboardX.proto import event_pb2

from smolray.config import ConfigError
from smolray.run.folder import RunFolder
from smolray.tracking.feed import fed
from smolray.tracking.registry import require_trackers, tracker_consumers
from tests.tracked import IMAGES, add_events, end, step, tracked_run

pytestmark = pytest.mark.seconds


@pytest.fixture
def send(tmp_path, monkeypatch):
    """send(config, tracker) -> what was said, once the tracker has followed the run to its end"""
    monkeypatch.chdir(tmp_path)

    def send(config, name):
        said = []
        consumers = list(tracker_consumers(config, [name], lambda: IMAGES))
        with fed(config.run_dir, consumers, said.append, 60) as feeds:
            pass
        assert feeds[0].complete, said
        return said

    return send


def board(folder):
    """(tag, step, value or text or image) of each value in TensorBoard's files"""
    found = []
    for file in sorted(Path(folder).iterdir()):
        data = file.read_bytes()
        while data:  # TFRecord: length (8 bytes), its crc (4), the record, its crc (4)
            length = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            for value in event.summary.value:
                text = [t.decode() for t in value.tensor.string_val]
                picture = value.image.encoded_image_string
                found.append((value.tag, event.step, picture or (text[0] if text else value.simple_value)))
            data = data[16 + length :]
    return found


def ended_wandb_runs(folder):
    """The records of each run of wandb in a folder. A file is whole shortly after `finish` returns."""
    from wandb.proto import wandb_internal_pb2

    for file in sorted(Path(folder).glob("offline-run-*/*.wandb")):
        records = []
        for _ in range(100):
            records = [wandb_internal_pb2.Record.FromString(data) for data in wandb_records(file)]
            if records and records[-1].WhichOneof("record_type") == "exit":
                break
            time.sleep(0.1)
        else:
            raise AssertionError(f"10 seconds after its run, {file} has {len(records)} records and no exit")
        yield records


def wandb_records(file):
    """The records of a file that wandb keeps to send later: LevelDB's log format, behind 7 bytes of its own."""
    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:  # the rest of a block is empty
            at += room
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if at + 7 + size > len(data):  # is being written
            return
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_tensorboard_has_the_surviving_history_and_goes_on_in_its_folder(tmp_path, send):
    config = tracked_run(tmp_path)
    (line,) = send(config, "tensorboard")
    folder = RunFolder(config.run_dir).tensorboard
    assert line == f"tensorboard: {folder}"
    found = board(folder)
    assert [(s, v) for tag, s, v in found if tag == "train/loss"] == [(1, 1.0), (2, 0.5), (3, 3.0), (4, 4.0)]
    assert {v for tag, _, v in found if tag == "performance/samples_per_second"} == {40}
    assert {tag: v for tag, _, v in found if tag.startswith("eval/")} == {
        "eval/accuracy": 0.5,
        "eval/accuracy/yes-no": 0.25,
        "eval/cer": 0.25,
    }
    samples = [v for tag, s, v in found if tag.startswith("samples/") and s == 4]
    assert sum(isinstance(v, bytes) and v.startswith(b"\x89PNG") for v in samples) == 2
    assert any("What colour?" in v and "blue** (wrong" in v for v in samples if isinstance(v, str))
    assert [v for tag, _, v in found if tag.startswith("checkpoint")] == [RunFolder(config.run_dir).checkpoint(4)]
    assert sum(tag.startswith("settings") for tag, _, _ in found) == 1

    add_events(config, step(5))
    send(config, "tensorboard")
    again = board(folder)
    assert [s for tag, s, _ in again if tag == "train/loss"] == [1, 2, 3, 4, 5]
    assert sum(tag.startswith("settings") for tag, _, _ in again) == 1


def test_mlflow_on_sqlite_has_the_run_and_goes_on_in_it(tmp_path, send, monkeypatch):
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "colours")
    config = tracked_run(tmp_path, "group=sweep")
    send(config, "mlflow")
    add_events(config, step(5), end())
    send(config, "mlflow")

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("colours").experiment_id])
    assert run.info.run_name == "demo" and run.info.status == "FINISHED"
    assert run.data.tags["group"] == "sweep"
    assert run.data.tags["checkpoint"] == RunFolder(config.run_dir).checkpoint(4)
    assert run.data.params["optimizer.learning_rate"] == "0.0001"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 0.5), (3, 3.0), (4, 4.0), (5, 0.2)]
    assert run.data.metrics["eval/accuracy/yes-no"] == 0.25
    folder = Path(client.download_artifacts(run.info.run_id, "samples"))
    told = json.loads((folder / "step-00000004.json").read_text())
    assert [(s["prediction"], s["correct"]) for s in told] == [("red", True), ("blue", False)]
    assert (folder / "step-00000004" / "1.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_mlflow_does_not_know_is_sent_anew(tmp_path, send, monkeypatch):
    config = tracked_run(tmp_path)
    for store in ("one", "two"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/{store}.db")
        send(config, "mlflow")
    with sqlite3.connect(tmp_path / "two.db") as db:
        assert db.execute("select count(*) from metrics where key = 'train/loss'").fetchone() == (4,)


def test_wandb_offline_has_the_run_under_one_id(tmp_path, send, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "colours")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    config = tracked_run(tmp_path, "group=sweep")
    send(config, "wandb")
    add_events(config, step(5), end())
    send(config, "wandb")

    runs, losses, summary, tables = [], [], {}, 0
    for records in ended_wandb_runs(tmp_path / "wandb"):
        for record in records:
            if record.WhichOneof("record_type") == "run":
                runs.append(record.run)
            values = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
            if "train/loss" in values:
                losses.append((int(values["train/global_step"]), float(values["train/loss"])))
            tables += "samples/path" in values
            summary |= {i.key or "/".join(i.nested_key): i.value_json for i in record.summary.update}
    assert {(run.project, run.display_name, run.run_group) for run in runs} == {("colours", "demo", "sweep")}
    assert len({run.run_id for run in runs}) == 1
    assert losses == [(1, 1.0), (2, 0.5), (3, 3.0), (4, 4.0), (5, 0.2)]
    (table,) = (tmp_path / "wandb").rglob("*.table.json")
    assert tables == 1 and '"blue"' in table.read_text()
    staged = [file.read_bytes()[:4] for file in (tmp_path / "data").rglob("*") if file.is_file()]
    assert staged.count(b"\x89PNG") == 2
    assert json.loads(summary["checkpoint"]) == RunFolder(config.run_dir).checkpoint(4)


@pytest.fixture(scope="module")
def other_packages(tmp_path_factory):
    """The environment of a Python with Trackio and SwanLab, which need an older pillow and protobuf than ours."""
    site = tmp_path_factory.mktemp("trackers")
    packages = ["trackio==0.43.0", "pillow<13", "brotli", "gradio-client>=2,<3", "python-multipart", "orjson"]
    packages += ["swanlab==0.10.3", "protobuf>=6.31,<7", "nvidia-ml-py", "pwinput", "pydantic-settings", "pyecharts"]
    packages += ["pyroaring", "simplejson", "prettytable", "watchdog", "wcwidth", "websockets"]
    options = ["--quiet", "--no-deps", "--retries=1", "--timeout=20", "--disable-pip-version-check", f"--target={site}"]
    command = [sys.executable, "-m", "pip", "install", *options, *packages]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if "No matching distribution found" in done.stderr:
        pytest.skip("Trackio and SwanLab are not installed here, and PyPI is not reachable to install them")
    assert done.returncode == 0, done.stderr
    return os.environ | {"PYTHONPATH": f"{site}:{Path(__file__).parents[3]}"}


SENDER = """
import sys
from pathlib import Path
from smolray.tracking.feed import fed
from smolray.tracking.registry import require_trackers, tracker_consumers
from tests.tracked import IMAGES, add_events, end, step, tracked_run

name, folder = sys.argv[1:]
config = tracked_run(Path(folder), "group=sweep")
for more in ([], [step(5), end()]):
    add_events(config, *more)
    require_trackers([name], config.run_dir)
    with fed(config.run_dir, list(tracker_consumers(config, [name], lambda: IMAGES)), print, 60) as feeds:
        pass
    assert feeds[0].complete
"""


def send_elsewhere(name, folder, environment):
    command = [sys.executable, "-c", SENDER, name, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_trackio_has_the_run_and_goes_on_in_it(tmp_path, other_packages):
    send_elsewhere("trackio", tmp_path, other_packages | {"TRACKIO_DIR": str(tmp_path / "store")})
    with sqlite3.connect(tmp_path / "store" / "smolray.db") as db:
        rows = [
            (step, json.loads(values)) for step, values in db.execute("select step, metrics from metrics order by id")
        ]
        ((settings,),) = db.execute("select config from configs").fetchall()
        assert db.execute("select count(distinct run_id) from metrics").fetchone() == (1,)
    losses = [(step, values["train/loss"]) for step, values in rows if "train/loss" in values]
    assert losses == [(1, 1.0), (2, 0.5), (3, 3.0), (4, 4.0), (5, 0.2)]
    (table,) = [values["samples"]["_value"] for _, values in rows if "samples" in values]
    assert [row["prediction"] for row in table] == ["red", "blue"]
    assert len(list((tmp_path / "store" / "media").rglob("*.png"))) == 2
    assert any(values.get("checkpoint", "").endswith("step-00000004") for _, values in rows)
    assert json.loads(settings)["optimizer.learning_rate"] == 1e-4


@pytest.mark.slow
def test_swanlab_offline_has_the_run_with_its_pictures(tmp_path, other_packages):
    send_elsewhere("swanlab", tmp_path, other_packages | {"SWANLAB_MODE": "offline"})
    first, second = sorted((tmp_path / "swanlog").glob("run-*"))
    for run in (first, second):  # only SwanLab's cloud continues a run
        assert len(list((run / "media" / "image").glob("*.png"))) == 2
        assert b"train/loss" in next(run.glob("*.swanlab")).read_bytes()
        assert "learning_rate" in (run / "files" / "config.yaml").read_text()


@pytest.mark.parametrize("name", ["trackio", "swanlab"])
def test_a_tracker_that_is_not_installed_is_refused_with_the_command(name, tmp_path):
    with pytest.raises(ConfigError, match=rf"{name}, which is not installed; run `pip install 'smolray\[{name}\]'`"):
        require_trackers([name], str(tmp_path))


def test_a_run_on_s3_needs_a_folder_for_tensorboard(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="set TENSORBOARD_LOGGING_DIR"):
        require_trackers(["tensorboard"], "s3://bucket/runs/demo")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))
    require_trackers(["tensorboard"], "s3://bucket/runs/demo")
