"""A stage that looks at no image gets batches of the same shapes without any image having been decoded."""

from dataclasses import fields, replace

import pytest
import torch

from smolray.config import load_config
from smolray.data.batch import Batch
from smolray.data.collate import Group, collate_imageless, collate_training
from smolray.data.encode import cached_encoder
from smolray.model.tiny import build_model
from tests.offline import asked, picture, shard_row


def test_batches_without_images_differ_in_nothing_but_the_pixels(tmp_path):
    path = build_model("tiny", ["what color is it? red"], tmp_path)
    config = load_config(None, [f"model.path={path}", "image.longest_edge=128"])
    encoder = cached_encoder(config.model, config.data, config.image)
    rows = [
        shard_row([picture(60, 60), picture(150, 100)], asked("both?", "yes", 2), asked("two?", "no", 2)),
        shard_row([], asked("1 and 1?", "2", 0)),
    ]
    want = collate_training([Group(row, tuple(range(len(row.conversations)))) for row in rows], encoder)
    cut_off = [replace(row, images=tuple(image[:200] for image in row.images)) for row in rows]  # the header alone
    groups = [Group(row, tuple(range(len(row.conversations)))) for row in cut_off]
    got = Batch.from_bytes(collate_imageless(groups, encoder).to_bytes())
    for name in (f.name for f in fields(Batch)):
        if name == "pixel_values":
            assert (
                got.pixel_values.shape == (len(want.pixel_values), 0, *want.pixel_values.shape[2:])
                and len(want.pixel_values) == 6
            )
        elif name == "meta":
            assert got.meta == want.meta
        else:
            assert torch.equal(getattr(got, name), getattr(want, name)), name
    with pytest.raises(OSError):
        collate_training(groups, encoder)
