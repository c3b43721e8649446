"""Turns of every notation are read; what is not to be trained is not, and a turn without content is no crash later."""

import json

import pytest

from smolray.config import DataConfig
from smolray.data.formats.turns import read_messages
from smolray.data.sample import Conversation, SampleError, check_sample
from tests.unit.data.formats.test_layouts import BLUE, RED, one, turns

USER, ANSWER = {"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}


@pytest.mark.parametrize(
    "roles", [("Human", "Assistant"), ("USER", "GPT"), ("user", "model"), ("human", "bot"), (" user ", "ChatGPT")]
)
def test_roles_are_known_in_any_case_and_by_their_usual_names(roles):
    asked, said = roles
    messages, _ = read_messages([{"role": asked, "content": "q"}, {"from": said, "value": "a"}], "messages")
    assert turns(messages) == [("user", ["q"]), ("assistant", ["a"])]


def test_a_developer_turn_is_a_system_turn():
    messages = [{"role": "developer", "content": "Be brief."}, USER, ANSWER]
    assert turns(one({"messages": messages}).conversation.messages)[0] == ("system", ["Be brief."])


@pytest.mark.parametrize("role", ["tool", "function", "Observation", "ipython"])
def test_a_tool_turn_is_quarantined_in_plain_words(role):
    with pytest.raises(SampleError, match="turns of tools are not supported") as error:
        one({"messages": [USER, {"role": role, "content": "42"}, ANSWER]})
    assert error.value.reason == "wrong_role"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": RED},
        {"type": "image", "path": "red.png"},
        {"type": "image", "url": "red.png"},
        {"type": "image_url", "image_url": {"url": "red.png"}},
        {"type": "image_url", "image_url": "red.png"},
        {"type": "input_image", "image_url": "red.png"},
        {"image": "red.png"},
        {"type": "image", "image": {"bytes": RED, "path": None}, "text": None, "url": None},
    ],
    ids=str,
)
def test_a_part_may_hold_its_picture_in_every_usual_way(part, tmp_path):
    (tmp_path / "red.png").write_bytes(RED)
    sample = one(
        {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "what?"}]}, ANSWER]}, folder=tmp_path
    )
    assert sample.images == (RED,) and turns(sample.conversation.messages)[0] == ("user", [None, "what?"])


def test_base64_sources_become_data_uris_and_files_keep_theirs():
    source = {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": "QUJD"}}
    file = {"type": "image", "image": "file:///pictures/1.png"}
    _, embedded = read_messages([{"role": "user", "content": [source, file]}], "messages")
    assert embedded == ["data:image/jpeg;base64,QUJD", "file:///pictures/1.png"]


def test_a_path_between_img_tags_is_a_picture(tmp_path):
    (tmp_path / "red.png").write_bytes(RED)
    conversation = [
        {"from": "user", "value": "Picture 1: <img>red.png</img>\nwhat?"},
        {"from": "assistant", "value": "a"},
    ]
    sample = one({"conversations": conversation}, folder=tmp_path)
    assert sample.images == (RED,) and turns(sample.conversation.messages)[0][1] == ["Picture 1: ", None, "\nwhat?"]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss": False}, {"weight": 0.0, "train": None}])
def test_a_turn_that_says_so_is_not_trained_and_shards_keep_that(mark):
    messages = [USER, ANSWER | mark, USER, ANSWER | {"weight": 1}]
    conversation = one({"messages": messages}).conversation
    assert [m.trained for m in conversation.messages] == [True, False, True, True]
    assert Conversation.from_json(conversation.to_json()) == conversation
    with pytest.raises(SampleError, match="every assistant turn says that it is not to be trained"):
        one({"messages": [USER, ANSWER | mark]})


def test_turns_that_are_trained_are_written_as_ever():
    text = one({"messages": [USER, ANSWER | {"weight": 1}]}).conversation.to_json()
    assert "trained" not in text and json.loads(text)["messages"][1].keys() == {"role", "content"}


def test_a_weight_between_0_and_1_is_refused():
    with pytest.raises(SampleError, match=r"0\.5.*expected 0 or 1"):
        one({"messages": [USER, ANSWER | {"weight": 0.5}]})


@pytest.mark.parametrize("nothing", [[], None])
def test_a_turn_without_content_is_quarantined_and_a_system_turn_left_out(nothing):
    system = {"role": "system", "content": nothing}
    assert [m.role for m in one({"messages": [system, USER, ANSWER]}).conversation.messages] == ["user", "assistant"]
    for messages in ([{"role": "user", "content": nothing}, ANSWER], [USER, {"role": "assistant", "content": nothing}]):
        with pytest.raises(SampleError, match="turn holds nothing"):
            one({"messages": messages})


@pytest.mark.parametrize(
    "value",
    [
        json.dumps([USER, ANSWER]),
        str([USER, ANSWER]),
        {"role": ["user", "assistant"], "content": ["what?", "red"]},
        {"from": ["human", "gpt"], "value": ["what?", "red"]},
    ],
    ids=["JSON", "Python", "dict of lists", "dict of lists, LLaVA"],
)
@pytest.mark.parametrize("column", ["messages", "conversations", "conversation"])
def test_messages_may_be_text_or_a_dict_of_lists(value, column):
    assert turns(one({column: value}).conversation.messages) == [("user", ["what?"]), ("assistant", ["red"])]


def test_a_system_column_is_the_first_turn_unless_the_messages_have_one():
    record = {"system": "In French.", "messages": [USER, ANSWER]}
    assert turns(one(record).conversation.messages)[0] == ("system", ["In French."])
    own = {"role": "system", "content": "In Greek."}
    texts = [m.text for m in one(record | {"messages": [own, USER, ANSWER]}).conversation.messages]
    assert texts == ["In Greek.", "what?", "red"]


def test_alpaca_input_and_history_are_used():
    record = {"instruction": "<image>Name it", "input": "in Latin", "output": "felis", "images": [RED]}
    sample = one(record | {"history": [["Hi", "Hello"]], "system": "Be brief."})
    assert turns(sample.conversation.messages) == [
        ("system", ["Be brief."]),
        ("user", ["Hi"]),
        ("assistant", ["Hello"]),
        ("user", [None, "Name it\nin Latin"]),
        ("assistant", ["felis"]),
    ]


def test_no_message_prints_base64_or_bytes():
    uri = "data:image/png;base64," + "QUJD" * 1000
    parts = [{"type": "picture", "picture": uri}, {"type": "picture", "picture": BLUE}, {"picture": "QUJD" * 100}]
    for part in parts:
        with pytest.raises(SampleError) as error:
            one({"messages": [{"role": "user", "content": [part]}, ANSWER]})
        assert len(str(error.value)) < 300 and "QUJDQUJDQUJDQUJDQUJDQUJDQUJDQUJD" not in str(error.value)
        assert "\\x" not in str(error.value)


def test_a_conversation_without_an_answer_to_train_is_no_sample():
    with pytest.raises(SampleError, match="no assistant turn"):
        check_sample(one({"messages": [USER]}, DataConfig()))
