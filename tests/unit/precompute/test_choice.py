"""`model.vision_features = auto`: features are computed once where that saves work and there is room."""

import shutil

import pytest

from smolray.config import load_config
from smolray.data.encode import cached_encoder
from smolray.data.index import index_uri, write_index
from smolray.data.local import local_index
from smolray.data.reader import Folders
from smolray.data.shards import write_shards
from smolray.precompute.choice import with_vision_features
from smolray.precompute.local import local_sidecars
from tests.offline import asked, picture, shard_row


def rows(count):
    return [shard_row([picture(60, 60, seed=i)], asked("what?", "box", name=f"a{i}")) for i in range(count)]


@pytest.fixture(scope="module")
def prepared(tiny_path, tmp_path_factory):
    """(the folders of 12 training and 4 validation rows, a function that makes configs of them)"""
    folder = tmp_path_factory.mktemp("prepared")
    folders = Folders(write_shards(str(folder / "train"), rows(12)), write_shards(str(folder / "validation"), rows(4)))

    def make(*overrides):
        return load_config(None, [f"model.path={tiny_path}", "model.train=[text]", "name=n", *overrides])

    for shards in (folders.train, folders.validation):
        for config in (make(), make("image.longest_edge=128")):
            encoder = cached_encoder(config.model, config.data, config.image)
            write_index(index_uri(shards, encoder), local_index(shards, config))
    return folders, make


def chosen(prepared, *overrides):
    folders, make = prepared
    said = []
    return with_vision_features(make(*overrides), folders, said.append).model.vision_features, said


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.num_train_epochs=3"],
        ["train.num_train_epochs=2"],
        ["train.num_train_epochs=3", "model.train=[text, connector]"],
        ["train.num_train_epochs=3", "model.train=[]", "lora={r: 4}"],
        ["train.max_steps=5", "train.per_device_train_batch_size=8", "train.global_batch=1"],  # 40 of 12
        ["search={num_samples: 4, metric: accuracy, space: {optimizer.learning_rate: {loguniform: [1e-5, 1e-3]}}}"],
    ],
)
def test_frozen_features_that_are_needed_often_are_computed_once(prepared, overrides):
    value, said = chosen(prepared, *overrides)
    assert value == "precompute"
    assert "computed once" in said[0] and "model.vision_features=compute" in said[0]


@pytest.mark.parametrize(
    "overrides",
    [
        [],  # one pass, one evaluation: nothing is computed twice
        ["train.num_train_epochs=3", "model.train=[vision]"],
        ["train.num_train_epochs=3", "lora={r: 4, groups: [vision]}"],
        ["train.num_train_epochs=3", "engine=trl", "image.upscale=true"],
        ["train.max_steps=1", "train.num_train_epochs=3"],  # max_steps overrides the epochs
        ["search={num_samples: 4, metric: accuracy, space: {image.longest_edge: {choice: [64, 128]}}}"],
    ],
)
def test_features_that_change_or_are_needed_once_are_computed_in_the_pass(prepared, overrides):
    assert chosen(prepared, *overrides) == ("compute", [])


def test_what_the_user_writes_stands(prepared):
    assert chosen(prepared, "model.vision_features=precompute") == ("precompute", [])
    assert chosen(prepared, "model.vision_features=compute", "train.num_train_epochs=9") == ("compute", [])


def test_a_disk_without_room_is_left_alone_and_the_cost_is_told(prepared, monkeypatch):
    full = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    value, said = chosen(prepared, "train.num_train_epochs=9")
    assert value == "compute" and "more than 50% of the" in said[0] and "computed in every pass" in said[0]


def test_features_that_stand_are_read_even_for_one_pass(prepared, tmp_path):
    folders, make = prepared
    copy = Folders(str(shutil.copytree(folders.train, tmp_path / "train")), folders.validation)
    assert with_vision_features(make(), copy).model.vision_features == "compute"
    local_sidecars(copy.train, make("model.vision_features=precompute"))
    said = []
    assert with_vision_features(make(), copy, said.append).model.vision_features == "precompute"
    assert said == ["vision features: frozen, and those that stand beside the shards are read"]
    assert with_vision_features(make("image.longest_edge=128"), copy).model.vision_features == "compute"
