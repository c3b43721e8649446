"""No column with images, options, a system prompt or context is left out in silence."""

import json

import pytest

from smolray.config import DataConfig
from smolray.data.first_rows import first_rows
from smolray.data.formats.discover import list_read_tasks, resolve
from smolray.data.formats.images import ImageReader
from smolray.data.formats.layouts import parse
from smolray.data.formats.source import SourceError
from smolray.data.formats.unused import unused_columns
from smolray.data.prepare import check_layout
from tests.offline import picture

RED, BLUE = picture(8, 6), picture(6, 8)
QUESTION = {"question": "what?", "answer": "red"}
MESSAGES = {"messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}]}


def unused(record, folder, data=None):
    data = data or DataConfig()
    parsed = parse(record, "row", data, ImageReader(str(folder), str(folder), data.max_image_pixels))
    return {u.column: u.kind for u in unused_columns(record, parsed, data)}


@pytest.mark.parametrize(
    ("columns", "kinds"),
    [
        ({"frames": {"bytes": RED, "path": None}}, {"frames": "image"}),
        ({"scan": "scans/1.PNG"}, {"scan": "image"}),
        ({"links": ["https://example.org/a.jpg?size=2"]}, {"links": "image"}),
        ({"uri": "data:image/png;base64,AAAA"}, {"uri": "image"}),
        ({"image_id": 42}, {"image_id": "image"}),
        ({"photo_key": "0007"}, {"photo_key": "image"}),
        ({"video": "a.mp4"}, {"video": "video"}),
        ({"image": RED, "clip": "a.webm"}, {"clip": "video"}),
        ({"image": RED, "mask": BLUE}, {"mask": "image"}),
        ({"image": "red.png", "overlay": "other.png"}, {"overlay": "image"}),
    ],
)
def test_what_looks_like_pictures_and_is_not_used_is_named(columns, kinds, tmp_path):
    (tmp_path / "red.png").write_bytes(RED)
    assert unused(QUESTION | columns, tmp_path) == kinds


@pytest.mark.parametrize(
    "columns",
    [
        {"image": RED, "file_name": "1.png", "coco_url": "http://example.org/1.png", "image_id": 1, "image_width": 8},
        {"image": "red.png", "filename": "data/red.png"},
        {"image": RED, "thumbnail": RED},
        {"image": None, "image_id": 42},
        {"image_caption": "a red field", "height": 6, "has_image": False},
        {"system": "", "hint": " ", "options": [], "history": "[]", "tools": ""},
    ],
)
def test_what_only_describes_a_picture_or_holds_nothing_may_stand_unused(columns, tmp_path):
    (tmp_path / "red.png").write_bytes(RED)
    assert unused(QUESTION | columns, tmp_path) == {}


@pytest.mark.parametrize(
    ("column", "value", "kind"), [("choices", ["a", "b"], "options"), ("hint", "a map", "context")]
)
def test_options_and_context_beside_messages_are_named(column, value, kind, tmp_path):
    assert unused(MESSAGES | {column: value}, tmp_path) == {column: kind}
    assert unused(MESSAGES | {column: value}, tmp_path, DataConfig(ignore_columns=(column,))) == {}


def test_a_run_stops_before_it_starts_and_names_the_column_and_the_setting(tmp_path):
    (tmp_path / "red.png").write_bytes(RED)
    rows = [QUESTION, QUESTION | {"scan": "red.png"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said = (
        r"column 'scan' is not used, and holds a path of an image: use it with data.columns.image=scan, "
        r"or leave it out with data.ignore_columns=\[scan\]"
    )
    with pytest.raises(SourceError, match=said):
        check_layout(list_read_tasks(resolve(str(tmp_path), DataConfig())), DataConfig())
    with pytest.raises(SourceError, match=said):
        first_rows(str(tmp_path), DataConfig(), 5)
    ignored = DataConfig(ignore_columns=("scan",))
    check_layout(list_read_tasks(resolve(str(tmp_path), ignored)), ignored)
    assert len(first_rows(str(tmp_path), ignored, 5).rows) == 2


def test_what_the_columns_were_used_as_is_told(tmp_path):
    record = {"Image": RED, "Question": "what?", "answer": "red", "question_id": 7, "answer_type": "other", "x": 1}
    parsed = parse(record, "row", DataConfig(), ImageReader(str(tmp_path), str(tmp_path), 1000))
    used = {"Image": "image", "Question": "question", "answer": "answer", "question_id": "id", "answer_type": "type"}
    assert parsed.used == used and parsed.samples[0].images == (RED,)
