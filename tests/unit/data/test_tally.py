"""Rows are counted once each, with what their columns were used as."""

import pytest

from smolray.config import DataConfig
from smolray.data.formats.source import SourceError
from smolray.data.formats.unused import ParsedRow
from smolray.data.prepare import check_overlooked
from smolray.data.sample import Sample
from smolray.data.tally import RowTally
from smolray.run.account import DataAccount, RowAccount
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


def test_the_index_that_pandas_writes_is_no_column_and_other_columns_without_a_name_are():
    tally = RowTally(DATA)
    tally.keep({"image": b"1", "q": "?", "Unnamed: 0": "17", "Unnamed: 0.1": 3, "Unnamed: 3": "4"}, parsed(b"1"))
    tally.keep({"image": b"1", "q": "?", "Unnamed: 0": "a text"}, parsed(b"1"))
    assert tally.account().unused == {"Unnamed: 0": 1, "Unnamed: 3": 1}


@pytest.mark.parametrize("column", ["Image", "photo", "mine"])
def test_an_empty_image_column_of_any_name_is_seen(column):
    tally = RowTally(DataConfig(columns={"image": "mine"}) if column == "mine" else DATA)
    tally.keep({column: None, "q": "?"}, parsed())
    assert tally.account().without_image == 1


def test_a_column_that_matters_is_found_in_whatever_row_it_begins():
    tally = RowTally(DATA)
    for number in range(300):
        late = (
            {"picture_2": b"\x89PNG\r\n\x1a\n" + bytes([number % 256]), "system": "be brief"} if number >= 290 else {}
        )
        tally.keep({"image": b"1", "q": "?", "split": "x", **late}, parsed(b"1"))
    account = tally.account()
    assert account.unused == {"split": 300, "picture_2": 10, "system": 10}
    assert list(account.overlooked.values()) == [10, 10]
    assert "column 'picture_2' is not used, and holds image bytes" in " ".join(account.overlooked)

    with pytest.raises(SourceError, match="in 10 of 300 rows column 'picture_2' is not used"):
        check_overlooked("x.parquet", account, DATA)
    few = DATA.replace({"max_bad_fraction": 0.05})
    check_overlooked("x.parquet", account, few)
    told = DataAccount("x.parquet", 300, account).lines("train")
    assert any("column 'picture_2'" in line and line.endswith(": 10 rows") for line in told), "few rows are told"

    whole = RowAccount.total([account, RowTally(DATA).account(), account])
    assert list(whole.overlooked.values()) == [20, 20]


def test_a_column_that_is_left_out_on_purpose_is_not_told():
    tally = RowTally(DataConfig(ignore_columns=["system"]))
    tally.keep({"image": b"1", "q": "?", "system": "be brief"}, parsed(b"1"))
    assert tally.account().overlooked == {}
