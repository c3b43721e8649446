"""Every layout that people keep image-text data in comes out as the same Sample."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from smolray.config import ColumnsConfig, DataConfig
from smolray.data.formats import layouts as parsers
from smolray.data.formats.discover import list_read_tasks, read_rows, resolve
from smolray.data.formats.images import ImageReader, folder_of
from smolray.data.formats.source import SourceError
from smolray.data.sample import SampleError

DATA = DataConfig()


def png(colour="red", size=(4, 3)) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", size, colour).save(sink, "PNG")
    return sink.getvalue()


RED, BLUE = png("red"), png("blue")


def samples_of(record, data=DATA, folder="/nowhere"):
    return parsers.parse(record, "file#0", data, ImageReader(str(folder), str(folder), data.max_image_pixels)).samples


def one(record, data=DATA, folder="/nowhere"):
    (sample,) = samples_of(record, data, folder)
    return sample


def turns(messages):
    """Messages as (role, parts) with text parts as strings and image parts as None."""
    return [(m.role, [None if p.type == "image" else p.text for p in m.content]) for m in messages]


def read_all(source, data=DATA, task_bytes=2**28):
    rows = []
    for task in list_read_tasks(resolve(str(source), data), task_bytes):
        images = ImageReader(folder_of(task.uri), task.root, data.max_image_pixels)
        for raw in read_rows(task):
            assert not raw.reason, raw.message
            rows += parsers.parse(raw.record, f"{task.name}#{raw.name or raw.row}", data, images).samples
    return rows


# Layouts


@pytest.mark.parametrize(
    "image", [RED, {"bytes": RED, "path": None}, {"bytes": RED, "path": "gone.png"}], ids=["binary", "struct", "both"]
)
@pytest.mark.parametrize("column", ["image", "images"])
def test_question_and_answer_about_an_image(image, column):
    sample = one({column: [image] if column == "images" else image, "question": "what colour?", "answer": "red"})
    assert sample.images == (RED,)
    assert turns(sample.conversation.messages) == [("user", [None, "what colour?"]), ("assistant", ["red"])]
    assert sample.conversation.answers == ("red",)
    assert sample.conversation.id == "file#0"


def test_vqav2_keeps_all_ten_answers_and_trains_the_consensus():
    answers = [
        {"answer": a, "answer_confidence": "yes", "answer_id": i + 1} for i, a in enumerate(["net"] * 7 + ["mesh"] * 3)
    ]
    record = {
        "question": "what is this?",
        "answers": answers,
        "multiple_choice_answer": "net",
        "answer_type": "other",
        "question_type": "what is",
    }
    sample = one(record | {"image": RED, "question_id": 262148000, "image_id": 262148})
    assert sample.conversation.answers == ("net",) * 7 + ("mesh",) * 3
    assert sample.conversation.messages[-1].text == "net"
    assert (sample.conversation.id, sample.conversation.type) == ("262148000", "other")


@pytest.mark.parametrize(
    "answers", [["a", "b", "b"], {"answer": ["a", "b", "b"], "answer_id": [1, 2, 3]}], ids=["list", "dict of lists"]
)
def test_without_a_consensus_the_most_common_answer_is_trained(answers):
    sample = one({"question": "q", "answers": answers, "image": RED})
    assert (sample.conversation.messages[-1].text, sample.conversation.answers) == ("b", ("a", "b", "b"))


def test_every_caption_is_a_conversation_and_none_is_lost():
    samples = samples_of({"image": RED, "captions": ["a red field", "red"], "id": "x"})
    assert [s.conversation.id for s in samples] == ["x/1", "x/2"]
    assert [s.conversation.messages[-1].text for s in samples] == ["a red field", "red"]
    assert turns(samples[0].conversation.messages)[0] == ("user", [None, parsers.CAPTION_PROMPT])


def test_the_prompt_setting_goes_before_a_question_or_takes_its_place():
    data = DataConfig(prompt="Answer in one word.")
    assert (
        one({"question": "colour?", "answer": "red"}, data).conversation.messages[0].text
        == "Answer in one word.\ncolour?"
    )
    assert one({"image": RED, "caption": "red"}, data).conversation.messages[0].text == "Answer in one word."


def test_named_columns_are_used_and_a_missing_one_is_reported():
    record = {"pic": RED, "q": "what?", "a": "red", "kind": "colour", "key": 7}
    sample = one(
        record, DataConfig(columns=ColumnsConfig(image="pic", question="q", answer="a", type="kind", id="key"))
    )
    assert (sample.images, sample.conversation.id, sample.conversation.type) == ((RED,), "7", "colour")
    with pytest.raises(
        SampleError, match=r"'picture' \(data.columns.image\) is not there; columns found: pic, q, a, kind, key"
    ):
        one(record, DataConfig(columns=ColumnsConfig(image="picture")))
    with pytest.raises(SampleError, match=r"columns found: pic, q.*expected messages \| conversations.*data.columns"):
        one(record)


def test_trl_messages_place_their_images_or_get_them_first():
    text = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "compare"},
        {"role": "assistant", "content": "red, blue"},
    ]
    sample = one({"messages": text, "images": [RED, BLUE]})
    assert turns(sample.conversation.messages)[1] == ("user", [None, None, "compare"])
    parts = [
        {"type": "text", "text": "first"},
        {"type": "image", "text": None},
        {"type": "text", "text": "then"},
        {"type": "image"},
    ]
    sample = one(
        {
            "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "ok"}],
            "images": [RED, BLUE],
        }
    )
    assert turns(sample.conversation.messages)[0] == ("user", ["first", None, "then", None])
    assert sample.images == (RED, BLUE)
    inside = [
        {"role": "user", "content": [{"type": "image", "image": {"bytes": BLUE}}]},
        {"role": "assistant", "content": "blue"},
    ]
    assert one({"messages": inside}).images == (BLUE,)


def test_llava_markers_are_places_of_images_in_human_turns_only():
    turns_ = [
        {"from": "human", "value": "<image>\nand <image>?"},
        {"from": "gpt", "value": "say <image>"},
        {"from": "human", "value": "why"},
    ]
    sample = one({"conversations": [*turns_, {"from": "gpt", "value": "so"}], "image": [RED, BLUE]})
    assert turns(sample.conversation.messages)[:2] == [
        ("user", [None, "and ", None, "?"]),
        ("assistant", ["say <image>"]),
    ]


def test_a_literal_marker_in_a_text_only_row_or_an_answer_stays_text():
    text = "what does <image> mean in HTML?<end_of_utterance>"
    sample = one({"question": text, "answer": "<image>"})
    assert turns(sample.conversation.messages) == [("user", [text]), ("assistant", ["<image>"])]


def test_the_cauldron_turns_are_one_conversation():
    sample = one(
        {"images": [RED], "texts": [{"user": "a?", "assistant": "b", "source": "s"}, {"user": "c?", "assistant": "d"}]}
    )
    assert [m.text for m in sample.conversation.messages] == ["a?", "b", "c?", "d"]


@pytest.mark.parametrize("form", ["strings", "messages"])
def test_prompt_and_completion(form):
    prompt, completion = "what?", "red"
    if form == "messages":
        prompt, completion = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": completion}]
    sample = one({"prompt": prompt, "completion": completion, "image": RED})
    assert turns(sample.conversation.messages) == [("user", [None, "what?"]), ("assistant", ["red"])]


USER = {"role": "user", "content": "what?"}
GOOD, BAD = {"role": "assistant", "content": "red"}, {"role": "assistant", "content": "blue"}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "what?", "chosen": "red", "rejected": "blue"},
        {"prompt": "what?", "chosen": "what?red", "rejected": "what?blue"},
        {"question": "what?", "chosen": "red", "rejected": "blue"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "what?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": "what?red", "rejected": "what?blue"},
    ],
    ids=[
        "strings",
        "repeated",
        "question",
        "messages",
        "repeated messages",
        "mixed",
        "implicit messages",
        "implicit strings",
    ],
)
def test_every_form_of_a_preference_is_one_prompt_with_two_endings(record):
    conversation = one(record | {"images": [RED]}).conversation
    assert turns(conversation.messages) == [("user", [None, "what?"])]
    assert (turns(conversation.chosen), turns(conversation.rejected)) == (
        [("assistant", ["red"])],
        [("assistant", ["blue"])],
    )


def test_rows_without_images_are_samples_too():
    assert one({"image": None, "question": "2 + 2?", "answer": 4}).images == ()
    assert one({"images": [], "messages": [USER, GOOD]}).images == ()


# Files


def test_parquet_cut_anywhere_gives_the_same_rows(tmp_path):
    rows = [
        {"image": {"bytes": png(size=(1, 1 + n)), "path": None}, "question": f"q{n}", "answer": "a", "label": n % 2}
        for n in range(23)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=3)
    whole, cut = read_all(tmp_path / "x.parquet"), read_all(tmp_path, task_bytes=1)
    assert len(list_read_tasks(resolve(str(tmp_path), DATA), 1)) == 8
    assert whole == cut and [s.conversation.id for s in whole] == [f"x.parquet#{n}" for n in range(23)]


def test_class_labels_are_named_by_the_metadata_of_the_file(tmp_path):
    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    table = pa.Table.from_pylist([{"image": {"bytes": RED, "path": None}, "label": 1}])
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "x.parquet")
    assert [s.conversation.messages[-1].text for s in read_all(tmp_path)] == ["dog"]


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_webdataset_parts_of_a_key_are_one_row(tmp_path, suffix):
    qa = json.dumps({"question": "what?", "answer": "red", "image": "original.png"}).encode()
    members = [
        ("d/1.png", RED),
        ("d/1.txt", "röd".encode()),
        ("d/2.x.png", RED),
        ("d/2.y.jpg", BLUE),
        ("d/2.json", qa),
        ("3.png", RED),
        ("3.cls", b"5"),
    ]
    write_tar(tmp_path / f"a-000.{suffix}", members, "w:gz" if suffix.endswith("gz") else "w")
    caption, vqa, label = read_all(tmp_path / f"a-{{000..000}}.{suffix}")
    assert (caption.conversation.messages[-1].text, caption.conversation.id) == ("röd", f"a-000.{suffix}#d/1")
    assert vqa.images == (RED, BLUE) and vqa.conversation.messages[-1].text == "red"
    assert label.conversation.messages[-1].text == "5"


@pytest.mark.parametrize("form", ["jsonl", "json", "indented"])
def test_json_lines_and_json_lists_read_images_next_to_them(tmp_path, form):
    (tmp_path / "images").mkdir()
    records = []
    for n in range(40):
        (tmp_path / "images" / f"{n}.png").write_bytes(png(size=(1, n + 1)))
        turn = [{"from": "human", "value": f"<image>\nwhät {n} ]}}"}, {"from": "gpt", "value": "yes"}]
        records.append({"image": f"images/{n}.png", "conversations": turn})
    text = (
        "\n\n".join(map(json.dumps, records))
        if form == "jsonl"
        else json.dumps(records, ensure_ascii=False, indent=2 if form == "indented" else None)
    )
    (tmp_path / f"x.{form if form == 'jsonl' else 'json'}").write_text(text, encoding="utf-8")
    whole, cut = read_all(tmp_path), read_all(tmp_path, task_bytes=16 * 300)
    assert len(list_read_tasks(resolve(str(tmp_path), DATA), 16 * 300)) > 5
    assert whole == cut and [s.images[0] for s in whole] == [png(size=(1, n + 1)) for n in range(40)]
    assert len({s.conversation.id for s in whole}) == 40


def test_image_paths_may_not_lead_out_of_the_source(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "red.png").write_bytes(RED)
    record = {"image": "../red.png", "question": "q", "answer": "a"}
    (tmp_path / "annotations" / "x.jsonl").write_text(json.dumps(record))
    with pytest.raises(SampleError, match="leads out of the data folder; name a folder that holds both") as error:
        read_all(tmp_path / "annotations" / "x.jsonl")
    assert error.value.reason == "path_escapes"
    assert read_all(tmp_path)[0].images == (RED,)
    (tmp_path / "annotations" / "x.jsonl").write_text(json.dumps(record | {"image": str(tmp_path / "red.png")}))
    assert read_all(tmp_path)[0].images == (RED,)
    with pytest.raises(SampleError, match="leads out of the data folder"):
        read_all(tmp_path / "annotations")
    with pytest.raises(SampleError, match="absolute, but the data is at s3://"):
        parsers.parse(record | {"image": "/etc/red.png"}, "x", DATA, ImageReader("s3://b/d", "s3://b/d", 100))


def test_a_hub_data_set_streams_through_datasets(tmp_path):
    rows = [
        {"image": {"bytes": png(size=(1, 1 + n)), "path": None}, "question": f"q{n}", "answer": "a"} for n in range(5)
    ]
    for split in ("train", "test"):
        pq.write_table(pa.Table.from_pylist(rows[: 5 if split == "train" else 2]), tmp_path / f"{split}.parquet")
    data = DataConfig(format="hub")
    assert [s.images[0] for s in read_all(tmp_path, data)] == [r["image"]["bytes"] for r in rows]
    assert len(read_all(f"{tmp_path}#test", data)) == 2
    with pytest.raises(SourceError, match="nosuch"):
        read_all(f"{tmp_path}#nosuch", data)


# Sources


def test_a_replaced_image_next_to_its_jsonl_makes_another_source(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"image": "images/a.png", "question": "q", "answer": "a"}')
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"one")
    (tmp_path / "notes.txt").write_text("no part of it")
    before = resolve(str(tmp_path), DATA)
    (tmp_path / "notes.txt").write_text("still none")
    assert resolve(str(tmp_path), DATA).identity == before.identity
    (tmp_path / "images" / "a.png").write_bytes(b"another")
    after = resolve(str(tmp_path), DATA)
    assert after.identity != before.identity and after.files == before.files


def test_a_source_is_found_or_the_error_says_what_is_there(tmp_path):
    for name in ("train-0.parquet", "train-1.parquet", "test-0.parquet"):
        pq.write_table(pa.table({"question": ["q"], "answer": ["a"]}), tmp_path / name)
    assert len(resolve(f"{tmp_path}/train-*.parquet", DATA).files) == 2
    assert len(resolve(f"{tmp_path}#test", DATA).files) == 1
    assert len(resolve(str(tmp_path), DataConfig(split="train")).files) == 2
    with pytest.raises(SourceError, match=r"several splits \(test, train\); choose with"):
        resolve(str(tmp_path), DATA)
    with pytest.raises(SourceError, match="no split 'validation'; splits found in its file names: test, train"):
        resolve(f"{tmp_path}#validation", DATA)
    with pytest.raises(SourceError, match="does not exist; expected a file, a folder, a glob or a hub"):
        resolve(f"{tmp_path}/nothing/here", DATA)
    write_tar(tmp_path / "x.tar", [])
    with pytest.raises(SourceError, match="3 parquet, 1 webdataset files; expected files of one format"):
        resolve(str(tmp_path), DATA)
    assert len(resolve(str(tmp_path), DataConfig(format="webdataset")).files) == 1
