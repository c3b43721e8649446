"""Real runs over Ray, followed live by MLflow on sqlite, W&B offline, TensorBoard and a class of the user."""

import importlib

import pytest

from smolray.config import load_config
from smolray.launch.driver import launch_run
from smolray.run.events import read_events
from smolray.run.folder import RunFolder
from tests.cluster.test_train import losses
from tests.unit.tracking.test_trackers import board

MODULE = """
import threading

seen, hold = [], threading.Event()

class Mine:
    def on_step(self, event):
        seen.append(event["step"])
        hold.wait()  # a callback that hangs

    def on_end(self, event):
        seen.append(event["status"])
"""


@pytest.fixture
def trackers(tmp_path, monkeypatch):
    """The folder of what the trackers of a test write."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "user_of_runs.py").write_text(MODULE)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    return tmp_path


@pytest.mark.slow  # tests/unit/tracking holds it in every make test, without Ray
def test_a_run_is_followed_and_its_resume_goes_on_in_the_same_tracker_run(make_run, trackers, monkeypatch):
    from mlflow.tracking import MlflowClient

    user = importlib.import_module("user_of_runs")
    followed = ["report_to=[tensorboard,mlflow,wandb]", "resources.num_workers=1", "engine.stage=0"]
    monkeypatch.setattr("smolray.launch.follow.END_SECONDS", 10.0)
    launch_run(make_run("followed", *followed, "train.max_steps=3", "callbacks=[user_of_runs:Mine]"))
    assert user.seen == [1], "the callback hangs in its first step, and the run has ended"
    user.hold.set()
    config = make_run("followed", *followed, "train.max_steps=5")
    assert launch_run(config)["steps"] == 5

    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("smolray").experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert {m.step: m.value for m in history} == losses(config) and len(history) == 5
    assert run.info.status == "FINISHED" and run.data.tags["checkpoint"] == RunFolder(config.run_dir).checkpoint(5)
    evaluated = [e for e in read_events(config.run_dir) if e["event"] == "evaluate"]
    accuracy = client.get_metric_history(run.info.run_id, "eval/accuracy")
    assert [(m.step, m.value) for m in accuracy] == [(e["step"], e["accuracy"]["overall"]) for e in evaluated]
    pictures = client.list_artifacts(run.info.run_id, "samples/step-00000005")
    assert pictures and all(p.path.endswith(".png") for p in pictures)

    found = board(RunFolder(config.run_dir).tensorboard)
    assert [step for tag, step, _ in found if tag == "train/loss"] == [1, 2, 3, 4, 5]
    ids = {file.name.removesuffix(".wandb") for file in trackers.glob("wandb/offline-run-*/*.wandb")}
    assert len(ids) == 1


def test_the_trials_of_a_search_are_one_group():
    from smolray.tune.result import trial_base

    config = load_config(None, ["name=sweep", "search={num_samples: 2}", "report_to=wandb"])
    assert trial_base(config).group == "sweep" and trial_base(config).report_to == ("wandb",)
    assert trial_base(config.replace({"group": "mine"})).group == "mine"


@pytest.mark.slow  # tests/unit/train/test_early_stopping.py holds it in every make test
def test_a_run_that_does_not_get_better_finishes_early_also_when_it_is_resumed(make_run):
    """A learning rate of almost nothing: no evaluation is better than the first, so the third is the last."""
    settings = ["optimizer.learning_rate=1e-12", "evaluate.eval_steps=2", "evaluate.early_stopping_patience=2"]
    settings += ["resources.num_workers=1", "engine.stage=0", "evaluate.max_samples=16"]
    settings += ["optimizer.lr_scheduler_type=constant", "optimizer.warmup_ratio=0"]  # the same whatever max_steps is
    whole = make_run("enough", *settings)
    result = launch_run(whole)
    assert (result["status"], result["steps"]) == ("finished", 6)
    events = read_events(whole.run_dir)
    assert [e["step"] for e in events if e["event"] == "evaluate"] == [2, 4, 6]
    assert [(e["step"], e["worse"]) for e in events if e["event"] == "early_stopping"] == [(6, 2)]

    cut = [*settings, "train.max_steps=4"]  # ends before the third evaluation
    assert launch_run(make_run("enough-cut", *cut))["steps"] == 4
    resumed = make_run("enough-cut", *settings)
    assert launch_run(resumed)["steps"] == 6
    assert losses(resumed) == losses(whole)
