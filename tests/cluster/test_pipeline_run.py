"""A pipeline of two workers through Ray Data and Ray Train: trained, evaluated, exported, resumed by another engine and
after a lost stage.
"""

import pytest

from smolray.config import load_config
from smolray.export import export_run
from smolray.launch.driver import evaluate_run, launch_run
from tests.cluster.test_train import (
    assert_every_sample_once,
    assert_same_curve,
    launched_with_a_killed_worker,
    losses,
)

PIPELINE = ("engine.name=pipeline", "train.num_train_epochs=1")


@pytest.fixture(scope="module")
def piped(ray_cluster, small_vqa, tmp_path_factory):
    """The uninterrupted run on two stages: (config, result, losses by step)."""
    from tests.cluster.conftest import make_run

    config = make_run.__wrapped__(ray_cluster, small_vqa, tmp_path_factory)("piped", *PIPELINE)
    result = launch_run(config)
    return config, result, losses(config)


# tests/cluster/test_dpo_run.py holds it in every make test
@pytest.mark.slow
def test_a_pipeline_trains_and_evaluates_and_counts_every_sample_once(piped):
    config, result, curve = piped
    assert result["status"] == "finished" and result["steps"] == len(curve)
    assert curve[max(curve)] < curve[1]
    assert result["accuracy_counts"]["overall"] > 32
    assert_every_sample_once(config)


@pytest.mark.slow
def test_its_checkpoint_says_in_one_process_what_the_gathered_stages_said(piped):
    config, result, _ = piped
    again = evaluate_run(load_config(f"{config.run_dir}/config.yaml"), "latest")
    assert again["accuracy"] == result["accuracy"] and again["step"] == result["steps"]


@pytest.mark.slow
def test_its_export_loads_in_plain_transformers(piped, tmp_path):
    """export_run compares the logits of the folder with the trained model's and refuses otherwise."""
    folder = export_run(piped[0].run_dir, out=str(tmp_path / "export"), name="latest")
    assert (tmp_path / "export" / "config.json").exists() and folder


@pytest.mark.slow
def test_one_worker_under_zero_gives_its_curve(make_run, piped):
    config = make_run("piped-alone", "train.num_train_epochs=1", "resources.num_workers=1", "engine.stage=0")
    launch_run(config)
    assert_same_curve(config, piped[2])


@pytest.mark.slow
def test_a_cut_that_does_not_fit_ends_the_run_at_once_with_the_reason(make_run):
    with pytest.raises(Exception, match="add up to 9 layers"):
        launch_run(make_run("piped-badly", *PIPELINE, "engine.partition=[4,4]"))


@pytest.mark.faults
def test_a_killed_stage_costs_nothing(make_run, piped):
    config = make_run("piped-killed", *PIPELINE)
    assert launched_with_a_killed_worker(config, -1)["status"] == "finished"
    assert_same_curve(config, piped[2])
    assert_every_sample_once(config)
