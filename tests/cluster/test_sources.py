"""Several sources, held-out validation data and the first samples of a source, as `prepare` makes shards of them."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from smolray import storage
from smolray.config import ConfigError, load_config
from smolray.data.formats.source import SourceError
from smolray.data.prepare import prepare, prepare_run, shard_folder, with_leak
from smolray.data.reader import ShardReader
from smolray.data.shards import prepared_account, read_manifest
from smolray.launch.data import prepare_data
from smolray.launch.driver import launch_run
from smolray.launch.resolve import with_absolute_paths
from smolray.run.status import request_stop
from smolray.train.audit import consumed
from tests.cluster.test_train import assert_same_curve, losses, when_step


def write_pictures(folder, numbers, questions=2, name="x.jsonl"):
    """A source of some images, each with some questions; the same number is the same image in every source."""
    folder.mkdir(exist_ok=True)
    records = []
    for n in numbers:
        pixels = np.random.default_rng(n).integers(0, 255, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
        records += [{"image": f"{n}.png", "question": f"q{k}", "answer": f"a{n % 3}"} for k in range(questions)]
    (folder / name).write_text("\n".join(map(json.dumps, records)))
    return str(folder)


def run_of(tmp_path, *overrides):
    settings = [f"storage={tmp_path}/runs", "model.path=tiny", "data.shard_bytes=65536", "resources.use_gpu=no"]
    return load_config(None, [*settings, *overrides])


def conversations(folder):
    return [c for row in ShardReader.open(folder).rows() for c in row.conversations]


def pictures_of(folder):
    return {image for row in ShardReader.open(folder).rows() for image in row.images}


def shards_of(folder):
    return {f.name: storage.read_bytes(f"{folder}/{f.name}") for f in read_manifest(folder).files}


def test_several_sources_are_shuffled_into_one_with_their_own_settings(ray_cluster, tmp_path):
    first, second = write_pictures(tmp_path / "a", range(10)), write_pictures(tmp_path / "b", range(7, 20), questions=1)
    run = run_of(tmp_path, f"data.train=[{{path: {first}, prompt: Short.}}, {second}]")
    manifest = prepare_run(run)["train"]
    folder = shard_folder(run, "train")
    found = conversations(folder)
    assert manifest.conversations == len(found) == 33 and len({c.id for c in found}) == 33
    assert all(c.messages[0].text.startswith("Short.") == (c.source == 0) for c in found)
    assert sorted(c.id for c in found if c.source == 1)[0] == "1:x.jsonl#0"
    shared = [row for row in ShardReader.open(folder).rows() if len({c.source for c in row.conversations}) == 2]
    assert len(shared) == 3, "pictures 7, 8 and 9 are one row each, with the conversations of both sources"
    assert [(one.path, one.conversations) for one in prepared_account(manifest).sources] == [(first, 20), (second, 13)]
    again = prepare(run.data.train, str(tmp_path / "cut"), run.data, task_bytes=200)
    assert shards_of(str(tmp_path / "cut")) == shards_of(folder) and again.fingerprint == manifest.fingerprint


def test_one_source_in_a_list_is_that_source(ray_cluster, tmp_path):
    source = write_pictures(tmp_path / "a", range(5))
    alone, listed = run_of(tmp_path, f"data.train={source}"), run_of(tmp_path, f"data.train=[{source}]")
    assert alone == listed
    weighted = run_of(tmp_path, f"data.train=[{{path: {source}, weight: 3}}]")
    assert shard_folder(weighted, "train") == shard_folder(alone, "train")


def test_weights_need_no_new_shards(ray_cluster, tmp_path):
    first, second = write_pictures(tmp_path / "a", range(10)), write_pictures(tmp_path / "b", range(10, 15))
    plain = run_of(tmp_path, f"data.train=[{first},{second}]")
    mixed = run_of(tmp_path, f"data.train=[{{path: {first}, weight: 1}}, {{path: {second}, weight: 1}}]")
    assert shard_folder(plain, "train") == shard_folder(mixed, "train")
    prepared, folders, accounts = prepare_data(mixed)
    assert prepared.data.train == folders.train and prepared.data.repeats == (1.0, 2.0)
    assert [(one.conversations, one.epoch) for one in accounts["train"].sources] == [(20, 20), (10, 20)]
    assert f"train: {second}: 10 conversations, 20 an epoch (50.0%)" in accounts["train"].lines("train")
    again, _, _ = prepare_data(prepared)
    assert again.data == prepared.data, "a run that is resumed keeps its mixture"
    assert prepare_data(plain)[0].data.repeats == ()
    with pytest.raises(ConfigError, match=r"data.repeats = \[2.0\]: .* is of 2 sources; expected one number for each"):
        prepare_data(prepared.replace({"data.repeats": [2]}))


def test_prepared_shards_are_not_mixed_with_others(ray_cluster, tmp_path):
    source = write_pictures(tmp_path / "a", range(4))
    prepare(source, str(tmp_path / "shards"), run_of(tmp_path).data)
    with pytest.raises(SourceError, match="shards is a folder of prepared shards, which takes no settings of its own"):
        prepare_run(run_of(tmp_path, f"data.train=[{source},{tmp_path}/shards]"))


def test_validation_data_are_held_out_without_a_picture_on_both_sides(ray_cluster, tmp_path):
    first, second = (
        write_pictures(tmp_path / "a", range(40)),
        write_pictures(tmp_path / "b", range(20, 60), questions=1),
    )
    run = run_of(tmp_path, f"data.train=[{first},{second}]", "data.validation_fraction=0.1")
    manifests = prepare_run(run)
    train, validation = (shard_folder(run, part) for part in ("train", "validation"))
    assert manifests["validation"].conversations == 12 and manifests["train"].conversations == 108
    assert not pictures_of(train) & pictures_of(validation) and len(pictures_of(train) | pictures_of(validation)) == 60
    lines = prepared_account(manifests["train"]).lines("train")
    assert "train: 12 conversations more are held out for validation; no image is on both sides" in lines

    whole = run_of(tmp_path, f"data.train=[{first},{second}]")
    assert shard_folder(whole, "train") != train
    prepared, folders, _ = prepare_data(run)
    assert (prepared.data.train, prepared.data.validation) == (folders.train, folders.validation) == (train, validation)
    assert prepared.data.validation_fraction == 0 and prepare_data(prepared)[1] == folders

    before = shards_of(train), shards_of(validation)
    storage.delete(f"{validation}/manifest.json")
    prepare_run(run)
    assert (shards_of(train), shards_of(validation)) == before, "made again, they are the same"
    other = run.replace({"seed": 1})
    prepare_run(other)
    assert pictures_of(shard_folder(other, "validation")) != pictures_of(validation)


def test_nothing_is_held_out_of_prepared_shards(ray_cluster, tmp_path):
    prepare(write_pictures(tmp_path / "a", range(4)), str(tmp_path / "shards"), run_of(tmp_path).data)
    for setting in ("validation_fraction=0.5", "max_samples=3"):
        with pytest.raises(ConfigError, match=r"shards: these shards are prepared already; name the raw data"):
            prepare_run(run_of(tmp_path, f"data.train={tmp_path}/shards", f"data.{setting}"))


@pytest.mark.parametrize("task_bytes", [2**28, 200])
def test_the_first_samples_of_each_source_are_read_and_nothing_behind_them(task_bytes, ray_cluster, tmp_path):
    first, second = write_pictures(tmp_path / "a", range(30)), write_pictures(tmp_path / "b", range(30, 60))
    (tmp_path / "b" / "40.png").write_bytes(b"never read")
    train = f"data.train=[{first}, {{path: {second}, max_samples: 9}}]"
    run = run_of(tmp_path, train, "data.max_samples=7")
    manifest = prepare(run.data.train, str(tmp_path / "out"), run.data, task_bytes=task_bytes)
    found = conversations(str(tmp_path / "out"))
    assert {c.id for c in found if c.source == 0} == {f"0:x.jsonl#{n}" for n in range(7)}
    assert {c.id for c in found if c.source == 1} == {f"1:x.jsonl#{n}" for n in range(9)}
    assert manifest.conversations == 16 and manifest.quarantined == {}


def test_a_picture_on_both_sides_is_told(ray_cluster, tmp_path):
    run = run_of(
        tmp_path,
        f"data.train={write_pictures(tmp_path / 'a', range(10))}",
        f"data.validation={write_pictures(tmp_path / 'b', range(8, 12))}",
    )
    accounts = prepare_data(run)[2]
    assert accounts["validation"].leaked == 2 and accounts["train"].leaked is None
    told = "validation: 2 of 4 images are also in the training data; their scores say less than they seem to"
    assert told in accounts["validation"].lines("validation")

    train, validation = (shard_folder(run, part) for part in ("train", "validation"))
    storage.delete(f"{train}/pictures.bin")  # as shards of an earlier version are
    assert with_leak(accounts["train"], train, validation).leaked is None


def test_the_same_conversation_in_two_sources_is_a_duplicate(ray_cluster, tmp_path):
    first, second = write_pictures(tmp_path / "a", range(6)), write_pictures(tmp_path / "b", range(4, 9))
    manifest = prepare_run(run_of(tmp_path, f"data.train=[{first},{second}]"))["train"]
    assert prepared_account(manifest).duplicates == 4


def test_held_out_data_of_sources_that_hang_together_are_refused(ray_cluster, tmp_path):
    source = write_pictures(tmp_path / "a", [1], questions=5)
    with pytest.raises(SourceError, match="all 5 conversations are about one image"):
        prepare_run(run_of(tmp_path, f"data.train={source}", "data.validation_fraction=0.2"))


@pytest.mark.slow
def test_a_mixture_is_trained_as_it_says_whatever_stops_it(make_run, small_vqa):
    sources = f"[{{path: {small_vqa}/train.parquet, repeats: 0.5}}, {{path: {small_vqa}/test.parquet, repeats: 1.5}}]"
    settings = [f"data.train={sources}", "data.validation=", "data.validation_fraction=0.1", "data.max_samples=150"]
    whole = make_run("mixture", *settings)
    assert launch_run(whole)["status"] == "finished"

    stopped = make_run("mixture-stopped", *settings)
    thread = when_step(stopped, 5, lambda: request_stop(stopped.run_dir))
    assert launch_run(stopped)["status"] == "stopped"
    thread.join(timeout=5)
    alone = make_run("mixture-stopped", *settings, "resources.num_workers=1", "engine.stage=0")
    assert launch_run(alone)["status"] == "finished"
    assert_same_curve(stopped, losses(whole))

    trained, folders, accounts = prepare_data(with_absolute_paths(whole))
    source_of = {c.id: c.source for c in conversations(folders.train)}
    assert trained.data.repeats == (0.5, 1.5)
    held, kept = (accounts[part].conversations for part in ("validation", "train"))
    assert held + kept == 300 and 27 <= held <= 30, "whole pictures, as many as fit into 10 %"
    history = consumed(stopped.run_dir)
    each = Counter(one for rows in history.values() for _, one in rows)
    assert [*history] == [0, 1] and each.keys() == source_of.keys()
    assert all(times == (1, 3)[source_of[one]] for one, times in each.items()), "over two epochs of 0.5 and 1.5"
