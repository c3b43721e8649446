"""Validation data that are held out: whole images, the fraction that is asked for, the same however it is cut."""

import numpy as np
import pytest

from smolray.data.formats.source import SourceError
from smolray.data.split import PICTURE_DTYPE, WHOLE, hold_out


def records(*conversations):
    """One (order key, images) for each conversation."""
    return np.array(
        [(order, picture, n == 0) for order, pictures in conversations for n, picture in enumerate(pictures)],
        PICTURE_DTYPE,
    )


def many(seed=0, pictures=4000):
    """Conversations about one to three images, of which neighbours share some."""
    rng = np.random.default_rng(seed)
    names = rng.integers(0, 2**63, pictures)
    found = []
    for n in range(pictures):
        own = names[n : n + (1 if n % 10 else 3)]
        found += [(int(own.sum() % 2**62), tuple(own))] * int(rng.integers(1, 6))
    return found


def sides(found, fraction):
    apart, rest = hold_out(records(*found), fraction)
    held = [pictures for order, pictures in found if apart.holds(order)]
    trained = [pictures for order, pictures in found if rest.holds(order)]
    assert len(held) + len(trained) == len(found)
    assert apart.share == pytest.approx(len(held) / len(found)) and rest.share == pytest.approx(1 - apart.share)
    return held, trained


@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.5])
def test_no_picture_is_on_both_sides_and_the_fraction_is_met(fraction):
    found = many()
    held, trained = sides(found, fraction)
    assert not {p for one in held for p in one} & {p for one in trained for p in one}
    assert len(held) == round(fraction * len(found))


def test_the_split_does_not_depend_on_the_order_of_the_rows():
    found = many(1)
    held = sides(found, 0.1)[0]
    assert sorted(held) == sorted(sides(found[::-1], 0.1)[0])


def test_pictures_that_a_chain_of_rows_links_stay_together():
    chain = [(n, (n, n + 1)) for n in range(100)]
    single = [(1000 + n, (1000 + n,)) for n in range(100)]
    held, trained = sides(chain + single, 0.1)
    assert len(held) == 20 and all(min(one) >= 1000 for one in held) and len(trained) == 180


def test_the_smallest_group_is_held_out_where_all_are_larger_than_the_fraction():
    held, _ = sides([(1, (1,))] * 6 + [(2, (2,))] * 4, 0.1)
    assert held == [(2,)] * 4


def test_pictures_that_all_hang_together_are_refused():
    with pytest.raises(SourceError, match="all 3 conversations are about one image"):
        hold_out(records((1, (1, 2)), (2, (2, 3)), (3, (3, 1))), 0.1)


def test_a_whole_has_every_row():
    assert WHOLE.holds(0) and WHOLE.holds(2**64 - 1) and WHOLE.share == 1
