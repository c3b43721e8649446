"""engine: trl through Ray Train: TRL's trainer on two workers leaves what every run leaves: events, predictions, a
checkpoint that exports.
"""

import pytest

from smolray import storage
from smolray.config import load_config
from smolray.export import export_run
from smolray.launch.driver import evaluate_run, launch_run
from smolray.run import checkpoint
from smolray.run.events import read_events, surviving


@pytest.fixture(scope="module")
def trl_run(ray_cluster, small_vqa, tmp_path_factory):
    from tests.cluster.conftest import make_run

    config = make_run.__wrapped__(ray_cluster, small_vqa, tmp_path_factory)(
        "by-trl", "engine=trl", "image.upscale=true", "train.audit=false", "train.global_batch=4"
    )
    return config, launch_run(config)


@pytest.mark.slow
def test_a_run_by_trl_trains_evaluates_and_leaves_a_checkpoint(trl_run):
    config, result = trl_run
    history = surviving(read_events(config.run_dir))
    steps = [e for e in history if e["event"] == "step"]
    assert result["status"] == "finished" and result["steps"] == len(steps) == steps[-1]["total_steps"]
    assert steps[-1]["loss"] < 0.6 * steps[0]["loss"]
    assert {
        "token_accuracy",
        "grad_norm",
        "learning_rate",
        "samples",
        "tokens",
        "label_tokens",
        "memory_bytes",
    } <= steps[0].keys()
    assert sum(e["samples"] for e in steps) == result["samples"] == 2 * 600  # two epochs of 600 questions
    assert result["accuracy_counts"]["overall"] == 64 and storage.exists(storage.join(config.run_dir, "report.html"))
    assert checkpoint.latest(config.run_dir).step == result["steps"]


@pytest.mark.slow
def test_its_checkpoint_evaluates_and_exports(trl_run):
    config, result = trl_run
    stored = load_config(storage.join(config.run_dir, "config.yaml"))
    assert evaluate_run(stored, "latest")["accuracy"] == result["accuracy"]
    assert storage.exists(storage.join(export_run(config.run_dir, name="latest"), "model.safetensors"))


@pytest.mark.slow
def test_a_finished_run_by_trl_is_not_trained_again(trl_run):
    config, result = trl_run
    storage.delete(storage.join(config.run_dir, "result.json"))
    before = len([e for e in read_events(config.run_dir) if e["event"] == "step"])
    assert launch_run(config)["accuracy"] == result["accuracy"]
    assert len([e for e in read_events(config.run_dir) if e["event"] == "step"]) == before
