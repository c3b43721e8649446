"""Samples are shown with the tokens of training: the trained ones marked, what is left out and why."""

import re

import pytest

from smolray.cli.preview_samples import item_text
from smolray.data.collate import Group, collate_training
from smolray.data.encode import cached_encoder
from smolray.data.sample import Conversation
from tests.offline import message, picture, shard_row
from tests.previews import config_of, items_of, printed
from tests.shards import write_shards

pytestmark = pytest.mark.seconds


def test_items_are_what_training_gets(shards, rows, model_path):
    config = config_of(model_path, shards, data={"max_length": 4096})
    encoder, items = cached_encoder(config.model, config.data, config.image), items_of(config, 10)
    assert [item.id for item in items] == [row.conversations[0].id for row in rows]
    for item, row in zip(items, rows, strict=True):
        batch = collate_training([Group(row, (0,))], encoder)
        assert item.tokens == batch.input_ids.shape[1] and item.label_tokens == batch.label_tokens
        assert item.image_tokens == int((batch.input_ids == encoder.image_token_id).sum())
        assert "".join(p.text for p in item.pieces if p.trained) == encoder.tokenizer.decode(batch.target_ids)
        plain = "".join(p.text for p in item.pieces if not p.image and not p.trained)
        assert row.conversations[0].messages[0].text in plain and item.note == ""
        assert [p.image for p in item.pieces].count(True) == len(row.images) == len(item.images)


@pytest.mark.parametrize(
    ("path", "wide", "square"),
    [
        ("tiny_path", "1 x 2 tiles and the whole, 48 image tokens", "1 tile, 16 image tokens"),
        ("published_path", "1 tile, 64 image tokens", "1 tile, 64 image tokens"),
    ],
)
def test_images_are_listed_with_their_size_tiles_and_tokens(shards, request, path, wide, square):
    item = items_of(config_of(request.getfixturevalue(path), shards), 2)[1]
    assert item.images == (f"120 x 60 PNG: {wide}", f"64 x 64 JPEG: {square}")
    shapes = [("image" if p.image else "trained" if p.trained else "text") for p in item.pieces]
    assert shapes == ["text", "image", "text", "trained", "text", "image", "text", "trained"]


def test_print_marks_the_trained_tokens_also_without_colours(shards, model_path):
    items = items_of(config_of(model_path, shards), 4)
    out, image = printed(item_text(items[0])), items[0].image_tokens + 3  # three special tokens around them
    assert f"<|im_start|>User:<image 1: {image} tokens>what is it?<end_of_utterance>" in out
    assert "Assistant:« a box<end_of_utterance>↵»" in out and "\x1b" not in out
    assert "\x1b[1;32m« a box" in printed(item_text(items[0]), force_terminal=True, color_system="standard")
    hostile = printed(item_text(items[3]), force_terminal=True, color_system="standard")
    assert "say <image> and \\x1b[31m!" in hostile and "no [red]tags[/red]" in hostile


@pytest.mark.parametrize(
    ("overlong", "note"),
    [
        ("drop", "left out: [0-9]+ tokens, data.max_length = 100"),
        ("truncate_text", "cut from [0-9]+ to 100 tokens"),
        ("error", "too-long: [0-9]+ tokens, data.max_length = 100"),
    ],
)
def test_overlong_samples_are_shown_with_what_becomes_of_them(shards, model_path, overlong, note):
    item = items_of(config_of(model_path, shards, data={"max_length": 100, "overlong": overlong}), 10)[4]
    assert item.id == "too-long" and re.fullmatch(note + ".*", item.note) and item.note in printed(item_text(item))
    assert (item.tokens == 100) == (overlong == "truncate_text")


def test_of_preference_data_both_endings_are_shown(tmp_path, model_path):
    pair = Conversation(
        "p-1", (message("user", None, "?"),), chosen=(message("assistant", "a"),), rejected=(message("assistant", "b"),)
    )
    folder = write_shards(str(tmp_path), [shard_row([picture(9, 9)], pair)])
    (item,) = items_of(config_of(model_path, folder), 5)
    assert [p.text.strip() for p in item.pieces if p.trained] == ["a<end_of_utterance>", "b<end_of_utterance>"]
    assert "rejected: " in printed(item_text(item))
