"""What is asked: every kind of input becomes questions in order, and what cannot be asked an error in its place."""

import io
import json
import random
import shutil
import tarfile
from itertools import chain

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smolray.config import ColumnsConfig, ConfigError, DataConfig
from smolray.data.formats.source import SourceError
from smolray.inference.questions import (
    PromptSettings,
    check_question_tasks,
    collate_questions,
    find_question_tasks,
    read_questions,
)
from tests.hostile import CLASSES
from tests.offline import asked, encoder_of, message, picture, shard_row
from tests.shards import write_shards


def questions_of(source, *prompts, images_each=2, **data):
    prompt_settings = PromptSettings(DataConfig(**data), prompts)
    question_tasks = find_question_tasks(str(source), prompt_settings, images_each)
    check_question_tasks(str(source), question_tasks, prompt_settings)
    return [*chain.from_iterable(read_questions(task, prompt_settings) for task in question_tasks)]


def said(questions):
    return [(q.id, q.prompt) for q in questions]


@pytest.fixture
def photos(tmp_path):
    """Three images, one of them in a subfolder, next to a text, a hidden file and a JSON of metadata."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(["b.png", "a.JPG", "more/c.webp"]):
        (folder / name).write_bytes(picture(30, 20, number))
    (folder / "notes.txt").write_text("no picture")
    (folder / "meta.json").write_text("{}")
    (folder / ".hidden.png").write_bytes(picture(30, 20))
    return folder


def table(folder, records, name="x.parquet"):
    pq.write_table(pa.Table.from_pylist(records), folder / name)
    return folder / name


def test_images_of_a_folder_glob_or_file_are_asked_in_path_order(photos):
    found = questions_of(photos, "What is it?")
    assert said(found) == [("a.JPG", "What is it?"), ("b.png", "What is it?"), ("more/c.webp", "What is it?")]
    assert found[2].path == f"{photos}/more/c.webp" and found[0].sample.images == (picture(30, 20, 1),)
    assert said(questions_of(f"{photos}/*.png", "?")) == [("b.png", "?")]
    assert said(questions_of(photos / "b.png")) == [("b.png", "Describe the image.")]
    odd = shutil.copy(photos / "b.png", photos / "odd#name.img0")
    assert said(questions_of(odd, "?")) == [("odd#name.img0", "?")]


def test_several_prompts_are_asked_of_each_image(photos):
    assert said(questions_of(photos / "b.png", "colour?", "shape?")) == [("b.png/1", "colour?"), ("b.png/2", "shape?")]


def test_an_instruction_of_the_run_is_asked_where_nothing_else_is(photos):
    assert {q.prompt for q in questions_of(photos, prompt="Caption:")} == {"Caption:"}
    assert {q.prompt for q in questions_of(photos, "Mine", prompt="Caption:")} == {"Mine"}


IMAGE = picture(20, 20)
MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "one?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "1"}]},
    {"role": "user", "content": [{"type": "text", "text": "two?"}]},
]
LAYOUTS = {
    "question without an answer": ({"image": IMAGE, "question": "what?"}, ["what?"]),
    "question with an empty answer": ({"image": IMAGE, "question": "what?", "answer": ""}, ["what?"]),
    "image struct alone": ({"image": {"bytes": IMAGE, "path": None}}, ["Describe the image."]),
    "five captions": ({"image": IMAGE, "captions": ["a", "b", "c", "d", "e"]}, ["Describe the image."]),
    "label": ({"image": IMAGE, "label": "cat"}, ["What is in the image?"]),
    "messages that end with the user": ({"images": [IMAGE], "messages": MESSAGES}, ["two?"]),
    "messages with an answer": ({"images": [IMAGE], "messages": MESSAGES[:2]}, ["one?"]),
    "images inside messages": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": "in?"}]}
            ]
        },
        ["in?"],
    ),
    "llava": (
        {"image": IMAGE, "conversations": [{"from": "human", "value": "<image>\nhm?"}, {"from": "gpt", "value": "a"}]},
        ["hm?"],
    ),
    "the cauldron": ({"images": [IMAGE], "texts": [{"user": "q", "assistant": "a"}]}, ["q"]),
    "prompt alone": ({"image": IMAGE, "prompt": "Write a story."}, ["Write a story."]),
    "prompt and completion": ({"image": IMAGE, "prompt": "Write.", "completion": "Once"}, ["Write."]),
    "preference": ({"image": IMAGE, "prompt": "Better?", "chosen": "yes", "rejected": "no"}, ["Better?"]),
    "text alone": ({"prompt": "Summarise: a b c"}, ["Summarise: a b c"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_of_any_layout_is_asked_with_or_without_its_answer(layout, tmp_path):
    record, prompts = LAYOUTS[layout]
    (question,) = questions_of(table(tmp_path, [record]))
    assert not question.error and [question.prompt] == prompts
    conversation = question.sample.conversation
    assert conversation.messages[-1] == message("assistant", "") and conversation.messages[-2].role == "user"
    assert question.sample.images == (() if layout == "text alone" else (IMAGE,))
    assert sum(p.type == "image" for m in conversation.messages for p in m.content) == len(question.sample.images)


def test_a_prompt_replaces_the_question_or_precedes_the_named_column(tmp_path):
    file = table(tmp_path, [{"question_id": 7, "image": IMAGE, "question": "what?", "q2": "why?"}])
    assert said(questions_of(file, "Describe.")) == [("7", "Describe.")]
    assert said(questions_of(file, "Briefly:", "At length:", columns=ColumnsConfig(question="q2"))) == [
        ("7/1", "Briefly:\nwhy?"),
        ("7/2", "At length:\nwhy?"),
    ]
    assert said(questions_of(file, prompt="Briefly:")) == [("7", "Briefly:\nwhat?")]


def test_rows_of_jsonl_tars_and_prepared_shards_are_asked(tmp_path):
    (tmp_path / "i.png").write_bytes(IMAGE)
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"image": "i.png", "question": q}) for q in ("a?", "b?")))
    assert said(questions_of(tmp_path / "x.jsonl")) == [("x.jsonl#0", "a?"), ("x.jsonl#1", "b?")]
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("one", "two"):
            info = tarfile.TarInfo(f"{name}.png")
            info.size = len(IMAGE)
            tar.addfile(info, io.BytesIO(IMAGE))
    assert said(questions_of(tmp_path / "x.tar", "?")) == [("x.tar#one", "?"), ("x.tar#two", "?")]
    shards = write_shards(
        str(tmp_path / "shards"), [shard_row([IMAGE], asked("what?", "a", name="1"), asked("why?", "b", name="2"))]
    )
    assert said(questions_of(shards)) == [("1", "what?"), ("2", "why?")]
    assert said(questions_of(shards, "Describe.")) == [("shard-00000.parquet#0", "Describe.")]


def test_what_cannot_be_asked_is_an_error_in_its_place(photos, tmp_path):
    (photos / "a.JPG").write_bytes(b"no picture at all")
    (photos / "b.png").write_bytes(picture(30, 20)[:-40])
    (photos / "more" / "d.png").write_bytes(b"")
    reasons = [q.error.partition(":")[0] for q in questions_of(photos, "?")]
    assert reasons == ["corrupt_image", "truncated_image", "", "empty_image"]

    rows = tmp_path / "rows"
    rows.mkdir()
    table(
        rows,
        [{"image": IMAGE, "question": "fine?"}, {"image": None, "question": None}, {"image": b"?", "question": "bad?"}],
        "1.parquet",
    )
    (rows / "2.parquet").write_bytes(b"PAR1 torn")
    table(rows, [{"image": IMAGE, "question": "last?"}], "3.parquet")
    found = questions_of(rows)
    assert [q.prompt for q in found] == ["fine?", "", "", "", "last?"]
    assert [q.error.partition(":")[0] for q in found] == ["", "wrong_columns", "corrupt_image", "torn_file", ""]
    assert [q.id for q in found[1:4]] == ["1.parquet#1", "1.parquet#2", "2.parquet"] and "2.parquet" in found[3].error


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("make", CLASSES, ids=lambda f: f.__name__)
def test_hostile_input_is_asked_reported_or_refused_without_lost_rows(make, seed, tmp_path, processor):
    case = make(random.Random(f"{make.__name__} {seed}"), tmp_path)
    try:
        found = questions_of(tmp_path, max_image_pixels=1_000_000)
    except SourceError as error:
        assert case.error or not case.rows or "wrong_columns" in str(error) or "invalid_json" in str(error)
        return
    assert len(found) >= case.rows or any(q.error.startswith("torn_file") for q in found)
    assert all(bool(q.error) != bool(q.sample) for q in found)
    encoder = encoder_of(processor, {"longest_edge": 128}, max_length=8192)
    batch, places = collate_questions(found, encoder, 8)
    answered = [a for a in places if a.place >= 0]
    assert len(places) == len(found) and all(bool(a.error) != (a.place >= 0) for a in places)
    assert sorted(a.place for a in answered) == list(range(len(batch.ends) if batch else 0))


def test_data_without_anything_to_ask_are_refused_before_a_model_is_loaded(photos, tmp_path):
    with pytest.raises(SourceError, match="nothing to ask; columns found: x; expected an image, question"):
        questions_of(table(tmp_path, [{"x": 1}] * 20))
    with pytest.raises(SourceError, match="is not there; columns found: question"):
        questions_of(table(tmp_path, [{"question": "?"}]), columns=ColumnsConfig(question="q"))
    with pytest.raises(SourceError, match="no image to ask about; columns found: question"):
        questions_of(table(tmp_path, [{"question": "?"}]), "Describe.")
    with pytest.raises(ConfigError, match="image files, which have no columns"):
        questions_of(photos, columns=ColumnsConfig(question="q"))
    with pytest.raises(SourceError, match="does not exist"):
        questions_of(tmp_path / "absent.png")
    with pytest.raises(SourceError, match="does not exist"):
        questions_of("photos/absent.png")  # and no hub data set
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="holds no file"):
        questions_of(tmp_path / "empty")


def test_questions_about_one_image_share_its_tokens_and_keep_their_places(processor, tmp_path):
    other = picture(40, 40, 5)
    records = [
        {"image": IMAGE, "question": "a?"},
        {"image": other, "question": "b?"},
        {"image": b"", "question": "c?"},
        {"image": IMAGE, "question": "d?"},
    ]
    batch, places = collate_questions(questions_of(table(tmp_path, records)), encoder_of(processor, max_length=8192), 8)
    assert len(batch.pixel_values) == 2 and batch.input_ids.shape[0] == 2 and int(batch.branch.max()) == 2
    assert [a.place for a in places] == [0, 2, -1, 1] and places[2].error.startswith("empty_image")


def test_a_prompt_that_leaves_no_room_for_the_answer_is_an_error(processor, tmp_path):
    questions = questions_of(table(tmp_path, [{"prompt": "short"}, {"prompt": "long " * 400}]))
    batch, places = collate_questions(questions, encoder_of(processor, max_length=300), 100)
    assert len(batch.ends) == 1 and [a.place for a in places] == [0, -1]
    assert "too_long: a prompt of" in places[1].error and "holds 300" in places[1].error
