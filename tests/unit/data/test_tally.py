"""Rows are counted once each, with what their columns were used as."""

import pytest

from smolray.config import DataConfig
from smolray.data.formats.unused import ParsedRow
from smolray.data.sample import Sample
from smolray.data.tally import RowTally
from tests.offline import asked

DATA = DataConfig()


def parsed(*images):
    return ParsedRow([Sample(images, asked("?", "a"))], {"image": "image", "q": "question"})


def test_each_row_is_counted_once_with_its_columns():
    tally = RowTally(DATA)
    tally.keep({"image": b"1", "q": "?", "split": "x", "note": None}, parsed(b"1"))
    tally.keep({"image": None, "q": "?", "split": "y"}, parsed())
    tally.keep({"q": "?"}, parsed())
    tally.quarantine("empty_answer")
    account = tally.account()
    assert (account.rows, account.with_images, account.text_only, account.without_image) == (4, 1, 2, 1)
    assert account.unused == {"split": 2} and account.quarantined == {"empty_answer": 1}


@pytest.mark.parametrize("column", ["Image", "photo", "mine"])
def test_an_empty_image_column_of_any_name_is_seen(column):
    tally = RowTally(DataConfig(columns={"image": "mine"}) if column == "mine" else DATA)
    tally.keep({column: None, "q": "?"}, parsed())
    assert tally.account().without_image == 1
