"""The account adds up, survives storage, and says in words what a person must know."""

import json

from smolray.run.account import DataAccount, RowAccount, account_lines

ROWS = RowAccount(
    with_images=90,
    text_only=6,
    without_image=4,
    quarantined={"empty_answer": 3, "missing_file": 1},
    used={"image": "image", "q": "question", "a": "answer"},
    unused={"split": 100},
)
ACCOUNT = DataAccount(
    "photos/",
    96,
    RowAccount.total([ROWS]),
    duplicates=2,
    too_long=10,
    untrained=1,
    cut=5,
    longest=(900, 800, 700),
    max_length=256,
)


def test_parts_of_a_source_add_up():
    total = RowAccount.total([ROWS, RowAccount(1, 2, 0, {"empty_answer": 1}, {"split": "type"}, {"b": 7, "a": 1})])
    assert (total.rows, total.with_images, total.text_only, total.without_image) == (104, 91, 8, 4)
    assert total.quarantined == {"empty_answer": 4, "missing_file": 1}
    assert total.used["split"] == "type" and total.unused == {"b": 7}, "a column used anywhere is a used one"


def test_the_record_survives_json_and_keys_of_another_version():
    record = json.loads(json.dumps(ACCOUNT.to_json()))
    assert (record["kept"], ACCOUNT.left_out) == (85, 11)
    assert DataAccount.from_json(record | {"later": 1}) == ACCOUNT


def test_the_words_hold_every_number_the_columns_and_what_to_do():
    said = "\n".join(ACCOUNT.lines("train"))
    for words in (
        "train: 100 rows read: 90 with images, 6 text-only (4 whose image is empty), 4 quarantined (empty_answer 3, ",
        "columns used: a as answer, image, q as question; not used: split",
        "85 of 96 conversations kept, 11 left out, 5 cut, 2 duplicates",
        "left out 10 conversations longer than data.max_length = 256 (the longest: 900, 800, 700 tokens): raise ",
        "cut the text of 5 conversations",
        "left out 1 conversations without a token to train on",
    ):
        assert words in said, said


def test_shards_of_an_older_version_tell_what_is_known():
    assert DataAccount("s", 5).lines("train") == ["train: 5 of 5 conversations kept, 0 left out, 0 cut, 0 duplicates"]


def test_lines_of_a_log_are_those_of_its_parts():
    said = account_lines({"event": "data", "time": 1, "validation": ACCOUNT.to_json()})
    assert said == ACCOUNT.lines("validation")
