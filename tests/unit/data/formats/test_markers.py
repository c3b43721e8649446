"""Markers of images in the text stand where the image goes; what does not match is quarantined with both numbers."""

import pytest

from smolray.data.sample import SampleError
from tests.unit.data.formats.test_layouts import BLUE, RED, one, turns

ANSWER = {"role": "assistant", "content": "ok"}
MARKERS = ["<image>", "<|image|>", "<ImageHere>", "<img>", "<image></image>", "<img><ImageHere></img>", "<IMAGE>"]
MARKERS += ["<image_placeholder>", "<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>"]


def asked(row):
    return turns(one(row).conversation.messages)[0][1]


@pytest.mark.parametrize("marker", MARKERS)
@pytest.mark.parametrize("layout", ["messages", "conversations", "texts", "question", "prompt", "parts", "chosen"])
def test_a_marker_stands_where_the_picture_goes_in_every_layout(layout, marker):
    text = f"First {marker} then {marker} differ how?"
    row = {
        "messages": {"messages": [{"role": "user", "content": text}, ANSWER]},
        "conversations": {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "ok"}]},
        "texts": {"texts": [{"user": text, "assistant": "ok"}]},
        "question": {"question": text, "answer": "ok"},
        "prompt": {"prompt": text, "completion": "ok"},
        "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}, ANSWER]},
        "chosen": {"prompt": text, "chosen": "ok", "rejected": "no"},
    }[layout]
    assert asked(row | {"images": [RED, BLUE]}) == ["First ", None, " then ", None, " differ how?"]


@pytest.mark.parametrize("marker", ["<image_{}>", "<image{}>", "<image {}>", "<|image_{}|>", "<img_{}>"])
@pytest.mark.parametrize("first", [0, 1])
def test_a_numbered_marker_chooses_its_picture(marker, first):
    text = f"{marker.format(first + 1)}\nand {marker.format(first)}?"
    sample = one({"question": text, "answer": "a", "image_1": RED, "image_2": BLUE})
    assert sample.images == (BLUE, RED) and asked({"images": [RED, BLUE], "question": text, "answer": "a"}) == [
        None,
        "and ",
        None,
        "?",
    ]


def test_a_picture_that_is_named_twice_stands_in_both_places():
    row = {"question": "<image 1> and <image 2>\nA. <image 1>", "answer": "A", "image_1": RED, "image_2": BLUE}
    assert one(row).images == (RED, BLUE, RED)


def test_trl_parts_choose_their_picture_by_index():
    parts = [{"type": "image", "index": 1}, {"type": "text", "text": "or"}, {"type": "image", "index": 0}]
    assert one({"messages": [{"role": "user", "content": parts}, ANSWER], "images": [RED, BLUE]}).images == (BLUE, RED)


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        ("<image><image>?", [RED], "place 2 images, the row has 1"),
        ("<image>?", [RED, BLUE], "place 1 images, the row has 2"),
        ("<image_3>?", [RED], "name the images 3, the row has 1"),
        ("<image_1>?", [RED, BLUE], "name the images 1, the row has 2"),
        ("<image>?", [], "1 markers of images, the row has 0 images"),
        ("what is <image> here?", None, "1 markers of images, the row has 0 images"),
    ],
)
def test_markers_that_do_not_match_the_pictures_are_told_with_both_numbers(text, images, message):
    with pytest.raises(SampleError, match=message) as error:
        one({"messages": [{"role": "user", "content": text}, ANSWER], "images": images})
    assert error.value.reason == "image_count"


def test_a_marker_at_the_start_asks_for_a_picture_even_where_the_row_has_no_column_for_it():
    with pytest.raises(SampleError, match="the row has 0 images"):
        one({"question": "<image>\nwhat?", "answer": "a"})
    assert asked({"question": "what does <image> mean?", "answer": "a"}) == ["what does <image> mean?"]


def test_a_marker_beside_parts_that_place_all_pictures_is_text():
    parts = [{"type": "image"}, {"type": "text", "text": "what is <image> in HTML?"}]
    assert asked({"messages": [{"role": "user", "content": parts}, ANSWER], "image": RED}) == [None, parts[1]["text"]]


def test_html_beside_a_marker_is_text():
    assert asked({"question": "<image>what does <img> do?", "answer": "a", "image": RED}) == [
        None,
        "what does <img> do?",
    ]
