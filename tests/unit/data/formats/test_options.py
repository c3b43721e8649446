"""Options go into the question in lettered form, and the answer is the option that it stands for."""

import pytest

from smolray.config import ColumnsConfig, DataConfig
from smolray.data.formats.images import ImageReader
from smolray.data.formats.layouts import parse
from smolray.data.formats.questions import parse_questions
from smolray.data.sample import SampleError
from tests.unit.data.formats.test_layouts import RED, one

ASKED = "Which?\nA. cat\nB. dog\nC. owl"
QUESTION = {"question": "Which?", "image": RED}


def asked_and_said(record, **settings):
    question, answer = one(record, DataConfig(**settings)).conversation.messages
    return question.text, answer.text


@pytest.mark.parametrize(
    "options",
    [
        {"options": ["cat", "dog", "owl"]},
        {"choices": ["A. cat", "B. dog", "C. owl"]},
        {"choices": {"label": ["A", "B", "C"], "text": ["cat", "dog", "owl"]}},
        {"options": {"A": "cat", "B": "dog", "C": "owl", "D": None}},
        {"options": [{"label": "A", "text": "cat"}, {"label": "B", "text": "dog"}, {"label": "C", "text": "owl"}]},
        {"options": "['cat', 'dog', 'owl']"},
        {"options": '["cat", "dog", "owl"]'},
        {"options": "['cat' 'dog'\n 'owl']"},
        {"options": "A. cat B. dog C. owl"},
        {"options": "cat\ndog\nowl"},
        {"A": "cat", "B": "dog", "C": "owl", "D": None},
        {"choice_a": "cat", "choice_b": "dog", "choice_c": "owl"},
        {"option1": "cat", "option2": "dog", "option3": "owl"},
    ],
    ids=str,
)
@pytest.mark.parametrize("answer", [1, "B", "(B)", "b", "dog", "B. dog", 1.0, "Dog"], ids=repr)
def test_options_of_every_form_are_lettered_and_the_answer_is_its_letter(options, answer):
    assert asked_and_said(QUESTION | options | {"answer": answer}) == (ASKED, "B")


@pytest.mark.parametrize("column", ["correct_choice_idx", "answer_index", "answerKey", "label"])
def test_the_answer_may_be_in_a_column_of_keys(column):
    record = QUESTION | {"choices": ["cat", "dog", "owl"], column: "C" if column == "answerKey" else 2}
    assert asked_and_said(record | {"direct_answers": "['an owl', 'owl']"}) == (ASKED, "C")


@pytest.mark.parametrize(("form", "said"), [("letter", "C"), ("letter_text", "C. owl"), ("text", "owl")])
def test_the_setting_says_what_is_trained(form, said):
    assert asked_and_said(QUESTION | {"choices": ["cat", "dog", "owl"], "answer": 2}, option_answer=form)[1] == said


@pytest.mark.parametrize(("answer", "said"), [(["A", "C"], "A, C"), ("AC", "A, C"), ([0, 2], "A, C")])
def test_several_right_options_are_all_kept(answer, said):
    assert asked_and_said(QUESTION | {"choices": ["cat", "dog", "owl"], "answer": answer})[1] == said


@pytest.mark.parametrize(
    ("key", "said"), [("text", "B"), ("index", "C"), ("index_from_1", "B")], ids=["text", "index", "from 1"]
)
def test_an_answer_that_fits_two_options_is_quarantined_until_a_setting_says_which(key, said):
    record = QUESTION | {"choices": ["1", "2", "3"], "answer": "2"}
    with pytest.raises(SampleError, match=r"the text of option B and the number of option C; .*data.answer_key"):
        one(record)
    assert asked_and_said(record, answer_key=key)[1] == said


@pytest.mark.parametrize("answer", ["bear", "D", 3, -1, "7"])
def test_an_answer_that_is_no_option_is_quarantined_with_the_options(answer):
    with pytest.raises(SampleError, match=r"none of the options A. cat, B. dog, C. owl") as error:
        one(QUESTION | {"choices": ["cat", "dog", "owl"], "answer": answer})
    assert error.value.reason == "wrong_answer"


def test_empty_options_are_an_open_question():
    for options in ("[]", [], None, ""):
        assert asked_and_said(QUESTION | {"options": options, "answer": "4"}) == ("Which?", "4")


def test_a_small_letter_is_a_letter_only_where_it_is_no_option():
    assert asked_and_said(QUESTION | {"choices": ["x", "y", "a"], "answer": "a"})[1] == "C"


def test_options_that_the_question_holds_are_not_repeated():
    assert asked_and_said(QUESTION | {"question": ASKED, "options": ["cat", "dog", "owl"], "answer": "B"})[0] == ASKED


def test_a_hint_stands_before_the_question_and_ignored_options_are_left_out():
    record = QUESTION | {"hint": "A zoo.", "choices": ["cat", "dog", "owl"], "answer": "dog"}
    assert asked_and_said(record)[0] == f"A zoo.\n{ASKED}"
    assert asked_and_said(record, ignore_columns=("choices", "hint")) == ("Which?", "dog")
    named = ColumnsConfig(options="picks", context="scene")
    assert asked_and_said(QUESTION | {"scene": "S.", "picks": ["x", "y"], "answer": 0}, columns=named)[0].startswith(
        "S.\nWhich?\nA. x"
    )


def test_a_question_without_its_answer_is_asked_as_it_is_trained():
    record = QUESTION | {"hint": "A zoo.", "choices": ["cat", "dog", "owl"], "system": "Be brief."}
    data, images = DataConfig(), ImageReader("/nowhere", "/nowhere", 1000)
    (asked,) = parse_questions(record, "x", data, images)
    (trained,) = parse(record | {"answer": 1}, "x", data, images).samples
    assert asked.conversation.messages[:-1] == trained.conversation.messages[:-1]
    assert [m.role for m in asked.conversation.messages] == ["system", "user", "assistant"]
