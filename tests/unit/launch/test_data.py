"""Too many conversations that would be left out stop a run before it trains, with the numbers and the settings."""

import pytest

from smolray.config import RunConfig
from smolray.data.plan import PlanError
from smolray.launch.data import require_images, require_kept
from smolray.run.account import DataAccount, RowAccount

HALF = DataAccount("s", 20, too_long=10, longest=(900, 800, 700), max_length=256)


def test_above_the_share_a_run_is_refused_with_the_numbers_and_the_settings():
    with pytest.raises(PlanError) as refused:
        require_kept("train", HALF, RunConfig())
    for words in (
        "10 of 20 train conversations would be left out, more than data.max_left_out_fraction = 0.1 allows",
        "longer than data.max_length = 256 (the longest: 900, 800, 700 tokens)",
        "raise data.max_length, lower image.max_tiles, or set data.overlong=truncate_text",
    ):
        assert words in str(refused.value)


@pytest.mark.parametrize(
    ("account", "allowed"),
    [
        (HALF, 0.5),
        (DataAccount("s", 20, too_long=1, untrained=1), 0.1),
        (DataAccount("s", 20, cut=20, duplicates=20), 0.1),
        (DataAccount("s", 0), 0.1),
    ],
)
def test_up_to_the_share_it_trains_and_is_told(account, allowed):
    require_kept("train", account, RunConfig(data={"max_left_out_fraction": allowed}))


@pytest.mark.parametrize(
    ("rows", "refused"),
    [
        (
            RowAccount(with_images=98, text_only=2, without_image=2),
            r"2 of 100 rows of s, the train data, have no image \(2 of them with an empty image",
        ),
        (RowAccount(with_images=98, text_only=2), "2 of 100 rows of s, the train data, have no image: more"),
        (RowAccount(with_images=0, text_only=50, without_image=50), "50 of 50 rows"),
        (RowAccount(with_images=99, text_only=1, without_image=1), ""),
        (RowAccount(text_only=50), ""),
        (RowAccount(with_images=50), ""),
    ],
)
def test_rows_without_pictures_in_a_picture_data_set_are_refused(rows, refused):
    account = DataAccount("s", 50, rows)
    if refused:
        with pytest.raises(PlanError, match=refused + r".*data\.text_only_ok=true"):
            require_images("train", account, RunConfig())
    else:
        require_images("train", account, RunConfig())
    require_images("train", account, RunConfig(data={"text_only_ok": True}))
