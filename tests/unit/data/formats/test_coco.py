"""The raw JSON of COCO captions, VQA v2 and TextVQA is read as it is downloaded."""

import json

import pytest

from smolray.config import DataConfig
from smolray.data.first_rows import first_rows
from smolray.data.formats.discover import list_read_tasks, read_rows, resolve
from smolray.data.formats.json_object import object_items
from smolray.data.formats.source import SourceError
from tests.offline import picture


def write(folder, name, content):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content, indent=None).encode())


def said(source, data=DataConfig()):
    """(image, question, answer) of each conversation."""
    rows = first_rows(str(source), data, 100).rows
    return sorted(
        (row.images[0], *(m.text for m in conversation.messages)) for row in rows for conversation in row.conversations
    )


def captions(*numbers):
    return {
        "info": {"year": 2017},
        "images": [{"id": n, "file_name": f"{n:012d}.jpg", "height": 6} for n in numbers],
        "licenses": [],
        "annotations": [
            {"id": 10 * n + k, "image_id": n, "caption": f"caption {n} {k}"} for n in numbers for k in (0, 1)
        ],
    }


@pytest.fixture
def coco(tmp_path):
    for split, numbers in (("train2017", (1, 2)), ("val2017", (3,))):
        write(tmp_path, f"annotations/captions_{split}.json", captions(*numbers))
        write(tmp_path, f"annotations/instances_{split}.json", captions(*numbers) | {"annotations": [{"bbox": [1, 2]}]})
        for n in numbers:
            write(tmp_path, f"{split}/{n:012d}.jpg", picture(8, 6, n))
    return tmp_path


def vqa(folder, split, numbers):
    questions = [{"image_id": n, "question": f"what is {n}?", "question_id": n * 1000} for n in numbers]
    annotations = [
        {
            "question_id": n * 1000,
            "image_id": n,
            "multiple_choice_answer": "net",
            "answers": [{"answer": "net", "answer_id": k} for k in range(10)],
            "answer_type": "other",
        }
        for n in numbers
    ]
    write(folder, f"v2_OpenEnded_mscoco_{split}_questions.json", {"info": {}, "questions": questions})
    record = {"info": {}, "annotations": annotations, "data_subtype": split}
    write(folder, f"v2_mscoco_{split}_annotations.json", record)
    for n in numbers:
        write(folder, f"{split}/COCO_{split}_{n:012d}.jpg", picture(8, 6, n))


def test_captions_of_a_split_are_read_with_their_images(coco):
    with pytest.raises(SourceError, match=r"several splits \(train, validation\)"):
        resolve(str(coco), DataConfig())
    found = said(f"{coco}#train")
    assert {(image, text) for image, _, text in found} == {
        (picture(8, 6, n), f"caption {n} {k}") for n in (1, 2) for k in (0, 1)
    }
    root = str(coco / "val2017")
    assert len(said(coco / "annotations" / "captions_val2017.json", DataConfig(image_root=root))) == 2


def test_answers_of_vqa_are_joined_with_their_questions_and_images(tmp_path):
    vqa(tmp_path, "train2014", (1, 2))
    vqa(tmp_path, "val2014", (3,))
    assert {(i, q, a) for i, q, a in said(f"{tmp_path}#val")} == {(picture(8, 6, 3), "what is 3?", "net")}
    conversation = first_rows(f"{tmp_path}#train", DataConfig(), 9).rows[0].conversations[0]
    assert len(conversation.answers) == 10 and conversation.id == "1000" and conversation.type == "other"


def test_a_question_or_an_annotation_without_the_other_is_told(tmp_path):
    vqa(tmp_path, "train2014", (1, 2, 3))
    name = tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json"
    record = json.loads(name.read_text())
    record["questions"][0]["question_id"] = 77
    write(tmp_path, name.name, record)
    rows = [row for task in list_read_tasks(resolve(str(tmp_path), DataConfig())) for row in read_rows(task)]
    assert [row.reason for row in rows] == ["wrong_columns", "", "", "empty_answer"]
    name.unlink()
    with pytest.raises(SourceError, match="holds answers, and no file of their questions is in"):
        first_rows(str(tmp_path), DataConfig(), 9)


def test_textvqa_is_read_with_its_images(tmp_path):
    data = [{"question": "what?", "question_id": n, "image_id": f"a{n}", "answers": ["x"] * 10} for n in (1, 2)]
    write(tmp_path, "TextVQA_0.5.1_train.json", {"dataset_type": "train", "data": data})
    for n in (1, 2):
        write(tmp_path, f"train_images/a{n}.jpg", picture(8, 6, n))
    assert [text for _, _, text in said(tmp_path)] == ["x", "x"]


def test_json_lines_and_single_records_are_no_objects_of_lists(tmp_path):
    line = {"images": [{"path": "a.png"}], "question": "q", "answer": "a"}
    write(tmp_path, "x.json", (json.dumps(line) + "\n").encode() * 3)
    assert resolve(str(tmp_path), DataConfig()).format == "jsonl"
    write(tmp_path, "x.json", {"question": "q", "answer": "a"})
    assert resolve(str(tmp_path), DataConfig()).format == "jsonl"


def test_an_object_is_streamed_or_refused(tmp_path):
    record = {"a": 1, "b": [1.5, {"c": [2]}, "x"], "empty": [], "d": None}
    for indent in (None, 1):
        (tmp_path / "x.json").write_text(json.dumps(record, indent=indent))
        assert [*object_items(str(tmp_path / "x.json"))] == [("a", 1), *(("b", v) for v in record["b"]), ("d", None)]
    text = json.dumps(record)
    for damaged in (text[:-1], text[:20], text + "}", text.replace(":", "", 1)):
        (tmp_path / "x.json").write_text(damaged)
        with pytest.raises(SourceError, match=r"x\.json is damaged: at character \d+"):
            list(object_items(str(tmp_path / "x.json")))
