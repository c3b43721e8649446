"""DPO on preference Parquet through Ray Data and Ray Train: each pair once over a stop and a resume, the same curve, and what people see of it."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smolray import checkpoint, storage
from smolray.config import load_config
from smolray.data.plan import PlanError
from smolray.events import read_events, surviving
from smolray.launch import RunError, evaluate_run, launch_run
from smolray.objectives import DPO_METRICS
from smolray.progress import event_line
from smolray.status import export_tensorboard, request_stop, run_status
from tests.cluster.test_train import assert_every_sample_once, when_step
from tests.shards import preference_rows


@pytest.fixture(scope="module")
def preference_data(tmp_path_factory):
    """train.parquet and test.parquet with image, prompt, chosen, rejected and question_type, as TRL's users have them."""
    folder = tmp_path_factory.mktemp("preference")
    for split, images in (("train", 50), ("test", 10)):
        rows = [
            {"image": {"bytes": row.images[0], "path": ""}, "prompt": pair.messages[0].text, "chosen": pair.chosen[0].text,
             "rejected": pair.rejected[0].text, "question_type": pair.type}
            for row in preference_rows(split, images) for pair in row.conversations
        ]  # fmt: skip
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
    return folder


@pytest.fixture
def make_dpo_run(make_run, preference_data):
    def make(name, *overrides):
        return make_run(name, "method=dpo", f"data.train={preference_data}/train.parquet", f"data.validation={preference_data}/test.parquet",
                        "optimizer.learning_rate=3e-4", *overrides)  # fmt: skip

    return make


def steps(config):
    return [e for e in surviving(read_events(config.run_dir)) if e["event"] == "step"]


def test_a_dpo_run_stops_and_resumes_exactly_and_shows_its_rewards(make_dpo_run, tmp_path):
    """Stopped on two workers, the reference a frozen copy; resumed on one: the curve of an uninterrupted run, each pair once an epoch."""
    reference = make_dpo_run("dpo")
    result = launch_run(reference)
    assert result["status"] == "finished"
    want = steps(reference)
    assert want[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-6) and want[-1]["rewards/margins"] > 0.05
    assert_every_sample_once(reference)

    # What is seen of it.
    assert 0.5 < result["accuracy"]["preference"] <= 1 and result["accuracy_counts"]["preference"] > 32
    evaluated = next(e for e in reversed(read_events(reference.run_dir)) if e["event"] == "evaluate")
    assert "preference" in event_line(evaluated)
    status = run_status(reference.run_dir)
    assert status.state == "finished" and status.loss == want[-1]["loss"] and status.accuracy["preference"] == result["accuracy"]["preference"]
    report = storage.read_bytes(storage.join(reference.run_dir, "report.html")).decode()
    assert "Reward margin" in report and "dpo, full weights" in report
    points = export_tensorboard(reference.run_dir, str(tmp_path / "board"))
    assert points > len(want) * len(DPO_METRICS)
    assert evaluate_run(load_config(storage.join(reference.run_dir, "config.yaml")), "latest")["accuracy"] == result["accuracy"]

    stopped = make_dpo_run("dpo-stopped")
    thread = when_step(stopped, 5, lambda: request_stop(stopped.run_dir))
    assert launch_run(stopped)["status"] == "stopped"
    thread.join(timeout=5)
    assert 0 < checkpoint.latest(stopped.run_dir).step < len(want)
    resumed = make_dpo_run("dpo-stopped", "resources.num_workers=1", "engine.stage=0")
    assert launch_run(resumed)["status"] == "finished"
    got = steps(resumed)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        for name in ("loss", *DPO_METRICS):
            assert a[name] == pytest.approx(b[name], abs=1e-4, rel=1e-4), (a["step"], name)
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    assert_every_sample_once(resumed)


def test_lora_with_the_adapter_switched_off_through_ray(make_dpo_run):
    config = make_dpo_run("dpo-lora", "lora={r: 4}", "model.train=[]", "engine.stage=3", "optimizer.learning_rate=1e-2",
                          "dpo.loss_type=[sigmoid,sft]", "dpo.loss_weights=[1,0.2]", "train.num_train_epochs=1")  # fmt: skip
    assert launch_run(config)["status"] == "finished"
    history = steps(config)
    assert history[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-6) and history[-1]["rewards/margins"] > 0.02
    assert_every_sample_once(config)


def test_answers_without_a_rejected_one_are_no_data_for_dpo(make_run):
    with pytest.raises((RunError, PlanError), match="have no chosen and rejected answer"):
        launch_run(make_run("dpo-wrong-data", "method=dpo"))
