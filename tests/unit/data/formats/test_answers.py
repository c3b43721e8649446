"""Answers and captions are trained as they are written, and a row's own question is never replaced."""

import pytest

from smolray.config import ColumnsConfig, DataConfig
from smolray.data.sample import SampleError
from tests.unit.data.formats.test_layouts import RED, one, samples_of

QUESTION = {"image": RED, "question": "what?"}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (1, "1"),
        (1.0, "1"),
        (2.5, "2.5"),
        ("1.0", "1.0"),
        (True, "yes"),
        ([10.5, 20.25, 30.0, 40.0], "[10.5, 20.25, 30.0, 40.0]"),
        ([3, 5], "[3, 5]"),
        ([[1, 2], [3, 4]], "[[1, 2], [3, 4]]"),
        ([4, 4, 4], "4"),
        ({"text": ["1920"], "answer_start": [7]}, "1920"),
        ({"answer": "x", "confidence": 1}, "x"),
    ],
)
def test_an_answer_is_trained_as_it_is_written(answer, said):
    assert one(QUESTION | {"answer": answer}).conversation.messages[-1].text == said


def test_a_dict_without_a_text_is_named():
    with pytest.raises(SampleError, match=r"'answer' is \{'total': '4.00', 'items': \['a'\]\} \(dict\); expected text"):
        one(QUESTION | {"answer": {"total": "4.00", "items": ["a"]}})


@pytest.mark.parametrize("answer", [None, float("nan"), "", " ", []])
def test_a_row_without_an_answer_is_an_empty_answer_and_no_other_layout(answer):
    with pytest.raises(SampleError) as error:
        one(QUESTION | {"answer": answer})
    assert error.value.reason == "empty_answer"


@pytest.mark.parametrize("column", ["text", "caption", "captions", "txt"])
@pytest.mark.parametrize("asks", ["question", "prompt", "instruction", "query"])
def test_a_row_keeps_its_own_question_before_a_caption(asks, column):
    sample = one({"image": RED, asks: "Transcribe", column: "hello"})
    assert [m.text for m in sample.conversation.messages] == ["Transcribe", "hello"]


@pytest.mark.parametrize(
    "sentences",
    [
        {"raw": "A cat.", "tokens": ["a", "cat"]},
        [{"raw": "A cat.", "tokens": ["a", "cat"]}],
        {"raw": ["A cat."], "tokens": [["a", "cat"]]},
        ["A cat."],
    ],
)
@pytest.mark.parametrize("named", ["", "sentences"])
def test_captions_in_structs_are_their_raw_text(sentences, named):
    data = DataConfig(columns=ColumnsConfig(answer=named))
    (sample,) = samples_of({"image": RED, "sentences": sentences, "cocoid": 1}, data)
    assert sample.conversation.messages[-1].text == "A cat."
