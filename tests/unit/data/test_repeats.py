"""Several sources in one epoch: each conversation as often as its source says, over the epochs and however many workers
read them.
"""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from smolray.config import ConfigError, DataConfig
from smolray.data.index import INDEX_SCHEMA, SOURCE
from smolray.data.plan import EpochPlans, PlanError, PlanLimits, build_epoch
from smolray.data.repeats import Repeats, kept_of_sources
from smolray.data.sources import repeats_of
from smolray.planner.statistics import DataStatistics

LIMITS = PlanLimits(samples=8, tokens=None, group=8)


def index_of(*sizes, per_row=3, tokens=(40,)):
    """An index of rows with `per_row` conversations; `sizes`: the rows of each source, one source after the other."""
    source = np.repeat(np.arange(len(sizes)), np.array(sizes) * per_row)
    row = np.arange(len(source)) // per_row
    columns = {
        "shard": row // 80,
        "row_group": row % 80 // 8,
        "row": row % 8,
        "conversation": np.arange(len(source)) % per_row,
        "tokens": np.array(tokens)[source % len(tokens)],
        "prefix": np.full(len(source), 20),
        "label_tokens": np.full(len(source), 2),
        "chosen_tokens": np.zeros(len(source)),
        "tiles": 1 + source,
    }
    table = pa.table({name: np.asarray(values) for name, values in columns.items()}).cast(INDEX_SCHEMA)
    return table.append_column(SOURCE, pa.array(source, pa.int32()))


def times(index, epochs, repeats, **settings):
    """How often each epoch trains each conversation: (epochs, index rows)."""
    plans = EpochPlans(index, PlanLimits(8, None, settings.pop("group", 8)), settings.pop("seed", 0), epochs, repeats)
    return np.stack([np.bincount(plans[n].index_rows, minlength=len(index)) for n in range(epochs)])


def test_an_epoch_trains_each_conversation_as_often_as_its_source_says():
    index = index_of(30, 50)
    (found,) = times(index, 1, (3, 1))
    assert set(found[:90]) == {3} and set(found[90:]) == {1}


def test_a_fraction_of_a_source_takes_turns_over_the_epochs():
    index = index_of(7, 10)
    found = times(index, 4, (0.25, 2.5))
    assert (found[:, :21].sum(1) == [5, 5, 6, 5]).all() and (found[:, :21].sum(0) == 1).all()
    assert (found[:, 21:].sum(1) == 75).all() and (found[:, 21:].sum(0) == 10).all()
    assert {*found[0, 21:]} == {2, 3} and {*found[0, :21]} == {0, 1}


def test_a_plan_of_repeats_is_the_same_each_time_and_another_in_each_epoch():
    index = index_of(20, 20)
    plans = [EpochPlans(index, LIMITS, 0, 2, (1.5, 1)) for _ in range(2)]
    assert (plans[0][1].index_rows == plans[1][1].index_rows).all()
    assert (plans[0][0].batch_start == plans[1][0].batch_start).all()
    assert list(plans[0][0].index_rows) != list(plans[0][1].index_rows)


def test_a_repeated_conversation_is_never_packed_with_itself():
    plan = EpochPlans(index_of(1, 1, per_row=4), LIMITS, 0, 1, (6, 5))[0]
    for number in range(len(plan)):
        for group in plan.micro_batch(number).groups:
            assert len(set(group.conversations)) == len(group.conversations)
    assert plan.samples == 44 and sum(plan.samples_in(range(n, n + 1)) for n in range(len(plan))) == 44


def test_repeats_of_one_leave_the_epoch_as_it_is_without_them():
    index = index_of(11, 17)
    plain, mixed = build_epoch(index, LIMITS, 3, 1), EpochPlans(index, LIMITS, 3, 2, (1, 1))[1]
    for name in ("index_rows", "group_start", "batch_start", "label_tokens", "tokens"):
        assert (getattr(plain, name) == getattr(mixed, name)).all()


def test_the_number_of_micro_batches_is_known_beforehand_where_all_epochs_have_it():
    index = index_of(40, 8, per_row=1)
    plans = EpochPlans(index, PlanLimits(4, None, 1), 0, 3, (1, 5))
    assert plans.samples == 80 and plans.micro_batches == 20 == len(plans[2])
    assert EpochPlans(index, PlanLimits(4, None, 1), 0, 3, (1, 0.3)).micro_batches is None


def test_an_epoch_without_conversations_is_refused():
    with pytest.raises(PlanError, match=r"epoch 0 has no conversation: data.repeats are too small"):
        EpochPlans(index_of(1, per_row=1), LIMITS, 0, 9, (0.1,))[0]


def test_weights_are_shares_of_an_epoch_that_leaves_nothing_out():
    data = DataConfig(train=[{"path": "a", "weight": 1}, {"path": "b", "weight": 3}, {"path": "c", "weight": 4}])
    index = index_of(40, 20, 160)
    repeats = repeats_of(data, index)
    assert repeats == (1, 6, 1)  # 120, 60 and 480 conversations: 120 + 360 + 480
    found = times(index, 1, repeats)[0]
    assert found.min() == 1 and Counter(np.repeat(index["source"].to_numpy(), found)) == {0: 120, 1: 360, 2: 480}


@pytest.mark.parametrize(
    ("train", "given", "expected"),
    [
        ("a", (), ()),
        ("shards", (2.0, 1.0), (2.0, 1.0)),
        (["a", "b"], (), ()),
        ([{"path": "a", "repeats": 2}, "b"], (), (2.0, 1.0)),
        ([{"path": "a", "weight": 5}, {"path": "b", "weight": 5}], (), ()),
    ],
)
def test_repeats_are_what_the_sources_say(train, given, expected):
    assert repeats_of(DataConfig(train=train, repeats=given), index_of(10, 10)) == expected


def test_a_weight_of_a_source_without_conversations_is_refused():
    data = DataConfig(train=[{"path": "a", "weight": 1}, {"path": "b", "weight": 1}])
    with pytest.raises(ConfigError, match=r"data\.train: b has a weight, and none of its conversations is trained"):
        repeats_of(data, index_of(10))


def test_conversations_that_are_left_out_do_not_count():
    index = index_of(10, 10, tokens=(0, 40))
    assert kept_of_sources(index, 2) == [0, 30]
    assert Repeats(index, (4, 2), 0).counts(0).tolist() == [0] * 30 + [2] * 30


def test_the_planner_sees_the_sources_in_the_shares_of_an_epoch():
    index = index_of(900, 100)
    plain, mixed = DataStatistics.from_index(index), DataStatistics.from_index(index, (1, 9))
    assert plain.samples == 1000 or plain.samples == 3000
    assert mixed.samples == 2700 + 2700 and abs(mixed.tiles_per_row - 1.5) < 0.01 < plain.tiles_per_row - 1.09 + 0.02
