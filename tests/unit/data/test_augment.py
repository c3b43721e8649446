"""Augmented images: of the same size, others in each epoch, the same wherever and whenever they are made."""

import io

import numpy as np
import pytest
from PIL import Image

from smolray.config import RunConfig, load_config
from smolray.config.errors import ConfigError
from smolray.data.augment import CHANGES, Augmentation
from smolray.data.encode import cached_encoder, training_encoder
from smolray.data.local import LocalStream, local_index, local_plans
from smolray.data.plan import PlanLimits, build_epoch
from tests.shards import vqa_rows, write_shards


def encoded(seed=0, size=(40, 30)):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pixels(names, data, seed=0, epoch=0):
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(Augmentation(names, seed, epoch)(data, image))


@pytest.mark.parametrize("name", CHANGES)
def test_each_change_keeps_the_size_and_differs_between_epochs_seeds_and_images(name):
    data = encoded()
    found = [pixels([name], data, seed, epoch) for seed in range(4) for epoch in range(6)]
    assert {one.shape for one in found} == {(30, 40, 3)} and {one.dtype for one in found} == {np.dtype(np.uint8)}
    assert len({one.tobytes() for one in found}) > 1
    assert (pixels([name], data, 1, 2) == pixels([name], data, 1, 2)).all()
    changed = [(pixels([name], encoded(n)) != pixels([], encoded(n))).any() for n in range(12)]
    assert any(changed), "some image is changed"


def test_the_list_of_the_settings_is_that_of_the_changes():
    assert RunConfig(data={"augment": list(CHANGES)}).data.augment == tuple(CHANGES)


def test_the_order_of_the_names_does_not_matter():
    data = encoded()
    assert (pixels(["crop", "color"], data) == pixels(["color", "crop"], data)).all()


@pytest.fixture(scope="module")
def run(tiny_path, tmp_path_factory):
    """(config with augmentation, folder of shards)"""
    folder = write_shards(str(tmp_path_factory.mktemp("shards")), vqa_rows("train", 12))
    return RunConfig(model={"path": str(tiny_path)}, data={"augment": ["crop", "flip"]}), folder


def test_training_batches_are_augmented_and_tokens_and_tiles_stay(run):
    config, folder = run
    plain = config.replace({"data.augment": []})
    plans = local_plans(folder, config.replace({"train.num_train_epochs": 2}))
    for epoch in (0, 1):
        numbers = range(len(plans[epoch]))
        ours, theirs = (list(LocalStream(folder, plans[epoch], numbers, one)) for one in (config, plain))
        for a, b in zip(ours, theirs, strict=True):
            assert (a.input_ids == b.input_ids).all() and a.pixel_values.shape == b.pixel_values.shape
        assert any((a.pixel_values != b.pixel_values).any() for a, b in zip(ours, theirs, strict=True))
        again = list(LocalStream(folder, plans[epoch], [*numbers][::-1], config))[::-1]
        assert all((a.pixel_values == b.pixel_values).all() for a, b in zip(ours, again, strict=True))


def test_two_epochs_see_other_images(run):
    config, _ = run
    first, second = (training_encoder(config, epoch).tiler.tiles(encoded()) for epoch in (0, 1))
    whole = cached_encoder(config.model, config.data, config.image).tiler.tiles(encoded())
    assert (first != second).any() and whole.shape == first.shape


def test_the_index_and_the_plan_do_not_know_of_it(run):
    config, folder = run
    plain = config.replace({"data.augment": []})
    assert local_index(folder, config).equals(local_index(folder, plain))
    assert build_epoch(local_index(folder, config), PlanLimits.of(config), 0, 3).epoch == 3


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["model.vision_features=precompute", "model.train=[text]"], "nearest: model.vision_features=compute"),
        (["method=dpo", "dpo.reference=precompute"], "nearest: dpo.reference=copy"),
        (["engine=trl", "image.upscale=true"], "nearest: engine=zero"),
    ],
)
def test_what_reads_images_once_is_refused(settings, why):
    with pytest.raises(ConfigError, match=rf"data\.augment = \['crop'\] with .*{why}"):
        load_config(None, ["data.augment=[crop]", "data.train=x", *settings])
