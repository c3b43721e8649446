"""Random mixtures of columns, nulls, markers and turns: a row becomes samples with all its images, or is told why."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smolray.config import DataConfig
from smolray.data.formats.columns import (
    ANSWER_COLUMNS,
    CAPTION_COLUMNS,
    MESSAGE_COLUMNS,
    QUESTION_COLUMNS,
    TYPE_COLUMNS,
)
from smolray.data.formats.image_columns import IMAGE_COLUMNS, WEAK_COLUMNS
from smolray.data.formats.images import ImageReader
from smolray.data.formats.layouts import parse
from smolray.data.formats.options import KEY_COLUMNS, OPTION_COLUMNS
from smolray.data.formats.preference import CHOSEN_COLUMNS, REJECTED_COLUMNS
from smolray.data.formats.question import CONTEXT_COLUMNS, HISTORY_COLUMNS, SYSTEM_COLUMNS
from smolray.data.formats.questions import parse_questions
from smolray.data.formats.unused import unused_columns
from smolray.data.sample import Conversation, SampleError
from tests.layouts.case import encoded

IMAGES = ImageReader("/nowhere", "/nowhere", 10**6)
PICTURES = [encoded(n) for n in range(4)]
TEXTS = ("what?", "a", "", " ", "<image>", "<image>\nwhat?", "First <image_2> then <image_1>?", "<img>", "a <|image|>")
ODD_TEXTS = (
    "A",
    "(B)",
    "2",
    "['a', 'b']",
    "[1, 2",
    "A. x B. y",
    "data:image/png;base64,AAAA",
    '{"rejected": 1}',
    "1.png",
)
OTHERS = ("A", "B", "C", "image_1", "image_2", "left", "right", "texts", "completion", "tools", "video", "weight")
COLUMNS = (
    *QUESTION_COLUMNS,
    *ANSWER_COLUMNS,
    *CAPTION_COLUMNS,
    *MESSAGE_COLUMNS,
    *OPTION_COLUMNS[:3],
    *KEY_COLUMNS[:3],
)
COLUMNS += (*IMAGE_COLUMNS[:8], *WEAK_COLUMNS, *CONTEXT_COLUMNS, *HISTORY_COLUMNS, *SYSTEM_COLUMNS, *CHOSEN_COLUMNS[:2])
COLUMNS += (*REJECTED_COLUMNS[:3], *TYPE_COLUMNS[:2], *OTHERS)

texts = st.sampled_from((*TEXTS, *ODD_TEXTS))
pictures = st.sampled_from(PICTURES).flatmap(lambda p: st.sampled_from([p, {"bytes": p, "path": None}]))
numbers = st.one_of(st.integers(-1, 3), st.sampled_from([0.0, 1.5, float("nan")]), st.booleans())
roles = st.sampled_from(["user", "human", "Assistant", "gpt", "system", "tool", None])
part = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image", "image_url", None, "video"])},
    optional={"text": texts, "image": pictures, "index": st.integers(0, 2), "image_url": st.none()},
)
content = st.one_of(texts, st.none(), numbers, st.lists(st.one_of(part, texts), max_size=3))
turn = st.fixed_dictionaries({}, optional={"role": roles, "content": content, "from": roles, "value": content})
marked = st.tuples(turn, st.sampled_from([{}, {"weight": 0}, {"train": False}])).map(lambda pair: pair[0] | pair[1])
chat = st.lists(marked, max_size=4)
nested = st.recursive(
    st.one_of(texts, numbers, st.none()), lambda s: st.lists(s, max_size=3) | st.dictionaries(texts, s, max_size=2)
)
lists = st.one_of(st.lists(texts, max_size=4), st.lists(pictures, max_size=3), chat)
values = st.one_of(texts, numbers, st.none(), pictures, lists, nested)
names = st.sampled_from(COLUMNS)
usual = st.fixed_dictionaries(
    {},
    optional={"image": pictures, "images": st.lists(pictures, max_size=3), "question": texts, "answer": texts}
    | {"options": st.lists(texts, max_size=4), "system": texts, "chosen": texts, "rejected": texts, "messages": chat},
)
records = st.tuples(usual, st.dictionaries(names, values, max_size=4)).map(lambda pair: pair[1] | pair[0])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(records)
def test_a_row_becomes_samples_with_all_its_pictures_or_is_told_why(record):
    data = DataConfig()
    try:
        parsed = parse(record, "row", data, IMAGES)
    except SampleError as error:
        assert str(error) and error.reason and len(str(error)) < 2000
        return
    assert parsed.samples and set(parsed.used) <= set(record)
    for sample in parsed.samples:
        turns = [*sample.conversation.messages, *sample.conversation.chosen]
        assert sum(p.type == "image" for m in turns for p in m.content) == len(sample.images)
        assert any(m.role == "assistant" and m.trained and m.text.strip() for m in turns)
        assert Conversation.from_json(sample.conversation.to_json()) == sample.conversation

    told = {u.column for u in unused_columns(record, parsed, data)} | set(parsed.used)
    kept = {image for sample in parsed.samples for image in sample.images}
    for column, value in record.items():
        held = {p for p in PICTURES if p == value or (isinstance(value, dict) and value.get("bytes") == p)}
        assert column in told or held <= kept, f"the picture in {column} is neither kept nor told"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(records)
def test_a_row_is_asked_with_all_its_pictures_or_is_told_why(record):
    try:
        samples = parse_questions(record, "row", DataConfig(), IMAGES)
    except SampleError as error:
        assert str(error) and error.reason
        return
    for sample in samples:
        placed = sum(p.type == "image" for m in sample.conversation.messages for p in m.content)
        assert placed == len(sample.images)
