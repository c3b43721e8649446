"""Features and reference log-probabilities made by real Ray Data jobs: once, whatever is killed on the way, and read in
place of images.
"""

import shutil
import time
from pathlib import Path

import pytest
import ray

from smolray.config import ConfigError, load_config
from smolray.data.ray_jobs import ensure_index
from smolray.data.shards import read_manifest
from smolray.launch.driver import evaluate_run, launch_run
from smolray.model.tiny import build_model
from smolray.precompute.jobs import ensure_features, ensure_sidecars, found_features, require_space
from smolray.precompute.local import local_sidecars
from smolray.run.events import read_events, surviving
from tests.shards import preference_rows, vqa_rows, write_shards
from tests.unit.data.test_sidecar import blind

ONCE = "model.vision_features=precompute"


def steps(config):
    return [e for e in surviving(read_events(config.run_dir)) if e["event"] == "step"]


def tables(uri):
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in Path(uri).glob("shard-*.parquet")}


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory):
    """(folder of 12 shards, its config)"""
    folder = tmp_path_factory.mktemp("many")
    shards = write_shards(str(folder / "shards"), vqa_rows("train", 120), rows_per_file=10)
    model = build_model("tiny", ["what is the shape"], folder / "model")
    return shards, load_config(None, [f"model.path={model}", "model.dtype=bfloat16", "model.train=[text]", ONCE])


@pytest.mark.faults
@pytest.mark.slow
def test_a_killed_job_resumes_and_writes_what_one_process_writes(ray_cluster, many_shards, tmp_path):
    shards, config = many_shards
    ensure_index(shards, config)

    @ray.remote(num_cpus=0.1, max_restarts=0)
    class Driver:
        def make(self):
            return ensure_features(shards, config, say=lambda line: None)

    driver = Driver.remote()
    driver.make.remote()
    deadline = time.monotonic() + 120
    while not (notes := list(Path(shards).glob("features-*/shard-*.parquet.json"))):
        assert time.monotonic() < deadline, "the job has made nothing"
        time.sleep(0.02)
    ray.kill(driver)
    uri = notes[0].parent
    made = {note.name.removesuffix(".json") for note in uri.glob("shard-*.json")}
    before = tables(uri)
    assert 0 < len(made) < 12 and not (uri / "manifest.json").exists() and not found_features(shards, config)

    said = []
    assert ensure_features(shards, config, said.append) == str(uri) == found_features(shards, config)
    after = tables(uri)
    assert len(after) == 12 and all(after[name] == before[name] for name in made), "what was whole has been made again"
    assert "(16 tokens x 96 in bfloat16 a tile)" in said[0] and str(uri) in said[0]
    assert said[-1] == f"vision features: {len(said) - 1} of {len(said) - 1} shards" and len(said) - 1 <= 12 - len(made)
    assert ensure_features(shards, config, said.append) == str(uri) and len(said) <= 13 and tables(uri) == after

    again = write_shards(str(tmp_path / "again"), vqa_rows("train", 120), rows_per_file=10)
    alone = tables(local_sidecars(again, config).features)
    assert {name: data for name, (_, data) in alone.items()} == {name: data for name, (_, data) in after.items()}


def test_features_that_do_not_fit_on_the_disk_are_refused(tmp_path):
    uri = str(tmp_path / "shards" / "features-0")
    require_space(uri, 1)
    with pytest.raises(
        ConfigError,
        match=r"needs [\d.]+ GiB in .*features-0, [\d.]+ GiB are free there; nearest: model.vision_features=compute",
    ):
        require_space(uri, 2 * shutil.disk_usage(tmp_path).total)


@pytest.mark.slow
def test_a_run_with_precomputed_features_is_the_run_with_computed_ones(make_run, tmp_path):
    """The same losses and answers, from shards whose images cannot be read any more."""
    settings = ("model.train=[text]", "train.num_train_epochs=1")
    computed = make_run("features-computed", *settings)
    want = launch_run(computed)
    stored = load_config(f"{computed.run_dir}/config.yaml")
    shards = shutil.copytree(stored.data.train, tmp_path / "train")
    ensure_sidecars(str(shards), load_config(f"{computed.run_dir}/config.yaml", [ONCE]), say=lambda line: None)
    for file in read_manifest(str(shards)).files:
        blind(shards / file.name)

    precomputed = make_run("features-precomputed", *settings, ONCE, f"data.train={shards}")
    got = launch_run(precomputed)
    assert [e["loss"] for e in steps(precomputed)] == pytest.approx([e["loss"] for e in steps(computed)], abs=1e-6)
    assert got["accuracy"] == want["accuracy"] and got["accuracy_counts"]["overall"] > 30
    assert amplification(got) < 1.2 * amplification(want), "more is read of the sidecar than of the shards"
    again = load_config(f"{precomputed.run_dir}/config.yaml")
    assert (
        found_features(again.data.validation, again) and evaluate_run(again, "latest")["accuracy"] == want["accuracy"]
    )


@pytest.mark.slow
def test_a_lora_run_of_several_epochs_computes_its_features_once_unasked(make_run, capsys):
    settings = ("model.train=[]", "lora={r: 4}", "train.num_train_epochs=3", "data.validation=")
    computed = make_run("lora-computed", *settings, "model.vision_features=compute")
    launch_run(computed)
    capsys.readouterr()
    automatic = make_run("lora-automatic", *settings)
    launch_run(automatic)

    assert "vision features: frozen, and needed 3 times: computed once" in capsys.readouterr().out
    assert load_config(f"{automatic.run_dir}/config.yaml").model.vision_features == "precompute"
    assert [e["loss"] for e in steps(automatic)] == pytest.approx([e["loss"] for e in steps(computed)], abs=1e-6)


def amplification(result):
    """Bytes read for each byte needed."""
    return sum(w["bytes_read"] for w in result["workers"]) / sum(w["bytes_needed"] for w in result["workers"])


@pytest.mark.slow
def test_a_dpo_run_reads_features_and_reference_log_probabilities(ray_cluster, make_run, tmp_path):
    """ZeRO-3, everything trained but the tower: a frozen copy could not be sharded there."""
    rows = preference_rows("train", 50)
    shards = write_shards(str(tmp_path / "pairs"), rows, rows_per_file=20)
    config = make_run(
        "dpo-precomputed",
        "method=dpo",
        f"data.train={shards}",
        "data.validation=''",
        "model.train=[connector,text]",
        "engine.stage=3",
        "dpo.reference=precompute",
        "train.num_train_epochs=1",
        ONCE,
    )
    assert launch_run(config)["status"] == "finished"
    history = steps(config)
    assert history[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-5) and history[-1]["rewards/margins"] > 0.01
    stored = load_config(f"{config.run_dir}/config.yaml")
    made = ensure_sidecars(shards, stored, say=lambda line: pytest.fail(f"made again: {line}"))
    again = local_sidecars(write_shards(str(tmp_path / "again"), rows, rows_per_file=20), stored)
    for mine, theirs in ((made.features, again.features), (made.logps, again.logps)):
        assert [data for _, data in tables(mine).values()] == [data for _, data in tables(theirs).values()]
