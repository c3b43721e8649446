"""DPO on preference Parquet through Ray Data and Ray Train: each pair once over a stop and a resume, the same curve,
and what people see of it.
"""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smolray import storage
from smolray.config import load_config
from smolray.data.plan import PlanError
from smolray.export import export_run
from smolray.launch.driver import evaluate_run, launch_run
from smolray.objectives.base import PREFERENCE_METRICS
from smolray.run import checkpoint
from smolray.run.events import read_events, surviving
from smolray.run.progress import event_line
from smolray.run.status import request_stop, run_status
from smolray.tracking.points import point_of
from tests.cluster.test_train import assert_every_sample_once, when_step
from tests.shards import preference_rows

LORA = ("lora={r: 4}", "model.train=[]", "optimizer.learning_rate=1e-2", "train.num_train_epochs=1")


@pytest.fixture(scope="module")
def preference_data(tmp_path_factory):
    """train.parquet and test.parquet with image, prompt, chosen, rejected, question_type: the layout of TRL's users."""
    folder = tmp_path_factory.mktemp("preference")
    for split, images in (("train", 50), ("test", 10)):
        rows = [
            {
                "image": {"bytes": row.images[0], "path": ""},
                "prompt": pair.messages[0].text,
                "chosen": pair.chosen[0].text,
                "rejected": pair.rejected[0].text,
                "question_type": pair.type,
            }
            for row in preference_rows(split, images)
            for pair in row.conversations
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def make_dpo_run(ray_cluster, small_vqa, preference_data, tmp_path_factory):
    from tests.cluster.conftest import make_run

    make = make_run.__wrapped__(ray_cluster, small_vqa, tmp_path_factory)
    data = [
        f"data.{part}={preference_data}/{file}.parquet" for part, file in (("train", "train"), ("validation", "test"))
    ]
    return lambda name, *overrides: make(name, "method=dpo", *data, "optimizer.learning_rate=3e-4", *overrides)


@pytest.fixture(scope="module")
def reference(make_dpo_run):
    """The uninterrupted run on two workers, its reference model a frozen copy: (config, result, step events)."""
    config = make_dpo_run("dpo")
    result = launch_run(config)
    return config, result, steps(config)


def steps(config):
    return [e for e in surviving(read_events(config.run_dir)) if e["event"] == "step"]


def assert_trained_evaluated_and_shown(config, result, what, margin):
    history = steps(config)
    assert result["status"] == "finished" and result["steps"] == len(history)
    assert history[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-6) and history[-1]["rewards/margins"] > margin
    assert_every_sample_once(config)
    assert 0.5 < result["accuracy"]["preference"] <= 1 and result["accuracy_counts"]["preference"] > 32
    evaluated = next(e for e in reversed(read_events(config.run_dir)) if e["event"] == "evaluate")
    assert "preference" in event_line(evaluated) and "margin" in event_line(history[-1])
    status = run_status(config.run_dir)
    assert (
        status.state == "finished"
        and status.loss == history[-1]["loss"]
        and status.accuracy["preference"] == result["accuracy"]["preference"]
    )
    report = storage.read_bytes(storage.join(config.run_dir, "report.html")).decode()
    assert "Reward margin" in report and what in report
    tagged = {name for event in history for name in point_of(event).values}
    assert {f"train/{name}" for name in PREFERENCE_METRICS} <= tagged


def test_a_dpo_run_in_a_pipeline_shows_its_rewards_and_is_exported(make_dpo_run, tmp_path):
    """Two stages through Ray, their adapters switched off for the reference.

    export_run compares the logits of the folder with the trained model's and refuses otherwise.
    """
    config = make_dpo_run("dpo-piped", "engine.name=pipeline", *LORA)
    assert_trained_evaluated_and_shown(config, launch_run(config), "dpo, LoRA r=4", 0.02)
    export_run(config.run_dir, out=str(tmp_path / "export"), name="latest")
    assert (tmp_path / "export" / "config.json").exists()


@pytest.mark.slow
def test_a_dpo_run_of_all_weights_trains_evaluates_and_shows_its_rewards(reference):
    assert_trained_evaluated_and_shown(*reference[:2], "dpo, full weights", 0.05)


@pytest.mark.slow
def test_a_stopped_run_resumes_exactly_with_the_reference_it_began_with(make_dpo_run, reference):
    """Stopped on two workers, resumed on one: the curve of the uninterrupted run, each pair once an epoch."""
    stopped = make_dpo_run("dpo-stopped")
    thread = when_step(stopped, 5, lambda: request_stop(stopped.run_dir))
    assert launch_run(stopped)["status"] == "stopped"
    thread.join(timeout=5)
    assert 0 < checkpoint.latest(stopped.run_dir).step < len(reference[2])
    resumed = make_dpo_run("dpo-stopped", "resources.num_workers=1", "engine.stage=0")
    assert launch_run(resumed)["status"] == "finished"
    got = steps(resumed)
    assert len(got) == len(reference[2])
    for a, b in zip(got, reference[2], strict=True):
        for name in ("loss", *PREFERENCE_METRICS):
            assert a[name] == pytest.approx(b[name], abs=1e-5, rel=1e-5), (a["step"], name)
    assert_every_sample_once(resumed)


@pytest.mark.slow
def test_a_checkpoint_evaluated_again_prefers_the_same(reference):
    config, result, _ = reference
    stored = load_config(storage.join(config.run_dir, "config.yaml"))
    assert evaluate_run(stored, "latest")["accuracy"] == result["accuracy"]


@pytest.mark.slow
def test_lora_with_the_adapter_switched_off_through_ray(make_dpo_run):
    config = make_dpo_run(
        "dpo-lora",
        *LORA,
        "engine.stage=3",
        "dpo.loss_type=[sigmoid,sft]",
        "dpo.loss_weights=[1,0.2]",
    )
    assert launch_run(config)["status"] == "finished"
    history = steps(config)
    assert history[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-6) and history[-1]["rewards/margins"] > 0.02
    assert_every_sample_once(config)


def test_answers_without_a_rejected_one_are_no_data_for_dpo(make_run):
    with pytest.raises(PlanError, match="have no chosen and rejected answer, but method = dpo learns from pairs"):
        launch_run(make_run("dpo-wrong-data", "method=dpo"))
