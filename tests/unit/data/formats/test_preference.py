"""Preference data of every layout is a prompt with a chosen and a rejected ending."""

import json

import pytest

from smolray.data.sample import SampleError
from tests.unit.data.formats.test_layouts import RED, one, samples_of, turns

USER, GOOD, BAD = (
    {"role": r, "content": c} for r, c in (("user", "what?"), ("assistant", "red"), ("assistant", "blue"))
)
LLAVA = [{"from": "human", "value": "<image>what?"}]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [USER, GOOD], "rejected_response": "blue"},
        {"messages": [USER, GOOD], "rejected_response": ["blue"]},
        {"messages": [USER, GOOD], "rejected_messages": [USER, BAD]},
        {"query": "what?", "response": "red", "rejected_response": "blue"},
        {"instruction": "what?", "input": "", "chosen": "red", "rejected": "blue"},
        {
            "conversations": LLAVA,
            "chosen": {"from": "gpt", "value": "red"},
            "rejected": {"from": "gpt", "value": "blue"},
        },
        {"text": json.dumps({"question": "what?", "chosen": "red", "rejected": "blue"})},
        {"chosen": [{"role": "Human", "content": "what?"}, GOOD], "rejected": [USER | {"role": "Human"}, BAD]},
        {"prompt": "what?", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD]},
        {"question": "what?", "chosen_response": "red", "rejected_response": "blue"},
    ],
    ids=["swift", "list", "messages", "query", "alpaca", "sharegpt", "RLHF-V", "roles", "ultrafeedback", "responses"],
)
def test_every_layout_gives_the_same_pair(record):
    conversation = one(record | {"images": [RED]}).conversation
    found = [turns(part) for part in (conversation.messages, conversation.chosen, conversation.rejected)]
    assert found == [[("user", [None, "what?"])], [("assistant", ["red"])], [("assistant", ["blue"])]]


def test_each_of_several_rejected_answers_is_a_pair():
    samples = samples_of({"messages": [USER, GOOD], "rejected_response": ["blue", "green"]})
    assert [s.conversation.rejected[0].text for s in samples] == ["blue", "green"]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "what?", "chosen": "red", "rejected": "red "},
        {"chosen": [USER, GOOD], "rejected": [USER, GOOD]},
        {"messages": [USER, GOOD], "rejected_response": "red"},
    ],
)
def test_an_equal_pair_is_quarantined(record):
    with pytest.raises(SampleError, match="are the same") as error:
        one(record)
    assert error.value.reason == "equal_pair"


def test_a_system_turn_that_the_endings_repeat_stands_once_in_the_prompt():
    system = {"role": "system", "content": "Be brief."}
    conversation = one(
        {"prompt": "what?", "chosen": [system, USER, GOOD], "rejected": [system, USER, BAD]}
    ).conversation
    assert [m.role for m in conversation.messages] == ["system", "user"]
    assert turns(conversation.rejected) == [("assistant", ["blue"])]
