"""A row with several questions about its image: ST-VQA, OCR-VQA, Visual Genome."""

import json
import re

import pytest

from smolray.config import DataConfig
from smolray.data.formats.images import ImageReader
from smolray.data.formats.layouts import parse
from smolray.data.formats.questions import parse_questions
from smolray.data.sample import SampleError
from tests.layouts.case import encoded

DATA = DataConfig()
READER = ImageReader("/nowhere", "/nowhere", DATA.max_image_pixels)
QAS = [{"question": "one?", "answers": ["1", "1", "2"]}, {"question": "two?", "answer": "B"}]


@pytest.mark.parametrize(
    "columns",
    [
        {"qas": QAS},
        {"QA": json.dumps(QAS)},
        {"question_answers": QAS, "image_id": 7},
        {"questions": ["one?", "two?"], "answers": [["1", "1", "2"], "B"]},
        {"questions": ["one?", "two?"], "answers": ["1", "B"], "title": "a book"},
        {"qas": {"question": ["one?", "two?"], "answers": [["1"], ["B"]]}},
    ],
    ids=",".join,
)
def test_each_question_of_a_list_becomes_a_conversation_about_the_same_picture(columns):
    record = {"id": "p", "image": encoded(1), **columns}
    samples = parse(record, "r", DATA, READER).samples
    said = [[m.text for m in s.conversation.messages] for s in samples]
    assert [turns[-2:] for turns in said] == [["one?", "1"], ["two?", "B"]]
    assert [s.conversation.id for s in samples] == ["p/1", "p/2"]
    assert len({s.images for s in samples}) == 1 and all(len(s.images) == 1 for s in samples)
    assert [s.conversation.messages[-2].text for s in parse_questions(record, "r", DATA, READER)] == ["one?", "two?"]


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"questions": ["one?", "two?"], "answers": ["1"]}, "2 questions and 1 answers"),
        ({"qas": [{"question": "one?", "answer": "1"}, {"question": "two?"}]}, "expected {question, answer}"),
        ({"qas": ["one?"]}, "expected {question, answer}"),
        ({"qas": [{"question": "one?", "answer": ""}]}, "the answer is empty"),
        ({"qas": 3}, "expected a list"),
    ],
    ids=str,
)
def test_a_list_of_questions_that_is_not_whole_is_quarantined(columns, told):
    with pytest.raises(SampleError, match=re.escape(told)):
        parse({"image": encoded(1), **columns}, "r", DATA, READER)


def test_questions_about_a_picture_that_the_row_does_not_have_are_not_trained_blind():
    record = {"id": 1, "qas": [{"image_id": 1, "question": "one?", "answer": "1"}]}
    with pytest.raises(SampleError, match="the row has no image, and qas names one in 'image_id'"):
        parse(record, "r", DATA, READER)
