"""The plan of an epoch: every conversation exactly once, whoever reads it and wherever it was interrupted, and little
read in vain.
"""

import itertools
import time
import weakref
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pytest

from smolray.config import RunConfig
from smolray.data.collate import collate_training
from smolray.data.encode import cached_encoder
from smolray.data.index import INDEX_SCHEMA
from smolray.data.local import local_index
from smolray.data.plan import EpochPlan, EpochPlans, PlanError, PlanLimits, build_epoch, check_kind
from smolray.data.reader import ShardReader
from smolray.data.stream import BATCHES_PER_TASK
from smolray.train.balance import MicroBatchBalancer
from tests.offline import asked, picture, shard_row
from tests.shards import vqa_rows, write_shards

LIMITS = PlanLimits(samples=8, tokens=None, group=8)


def synthetic_index(rows=10_007, seed=0, most=12, rows_per_shard=500):
    """Lines as `index_shard` writes them: rows of 1 to `most` conversations, up to 8 in a row group; no files."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, most + 1, rows)
    row = np.repeat(np.arange(rows), counts)
    first = np.cumsum(counts) - counts
    prefix = rng.integers(20, 60, rows)[row]
    in_shard = row % rows_per_shard
    columns = {
        "shard": row // rows_per_shard,
        "row_group": in_shard // 8,
        "row": in_shard % 8,
        "conversation": np.arange(len(row)) - first[row],
        "tokens": prefix + rng.integers(4, 40, len(row)),
        "prefix": prefix,
        "label_tokens": rng.integers(1, 5, len(row)),
        "chosen_tokens": np.zeros(len(row)),
        "tiles": np.ones(len(row)),
    }
    return pa.table({name: np.asarray(values) for name, values in columns.items()}).cast(INDEX_SCHEMA)


@pytest.fixture(scope="module")
def index():
    return synthetic_index()


@pytest.fixture(scope="module")
def plan(index):
    return build_epoch(index, LIMITS, 0, 0)


def seen(plan: EpochPlan, numbers) -> list[tuple[int, ...]]:
    """(shard, row group, row, conversation) of every conversation in these micro-batches, in order."""
    return [
        (g.shard, g.row_group, g.row, c) for n in numbers for g in plan.micro_batch(n).groups for c in g.conversations
    ]


def every(index) -> set[tuple[int, ...]]:
    return set(zip(*(index[c].to_pylist() for c in ("shard", "row_group", "row", "conversation")), strict=True))


def runs(plan: EpochPlan, global_batch: int, first: int = 0):
    """The optimizer steps of what is left of an epoch, as the loop cuts them."""
    return [range(s, min(s + global_batch, len(plan))) for s in range(first, len(plan), global_batch)]


def worker_numbers(plan, rank, world, global_batch, first=0):
    return [n for run in runs(plan, global_batch, first) for n in MicroBatchBalancer(rank, world).own(run)]


def test_every_conversation_exactly_once_on_any_number_of_workers(index, plan):
    assert plan.samples == len(index)
    whole = every(index)
    for world in (1, 2, 3, 4, 5):
        for global_batch in (world, 7):
            numbers = [n for rank in range(world) for n in worker_numbers(plan, rank, world, global_batch)]
            assert sorted(numbers) == list(range(len(plan)))
    order = seen(plan, range(len(plan)))
    assert len(order) == len(whole) and set(order) == whole


def test_the_order_of_steps_does_not_depend_on_the_number_of_workers(plan):
    for world in (1, 2, 3, 4, 5):
        for run in runs(plan, 7):
            assert [n for rank in range(world) for n in MicroBatchBalancer(rank, world).own(run)] == list(run)


@pytest.mark.parametrize("count", [0, 1, 2, 5, 7, 64])
def test_shares_are_contiguous_and_differ_by_at_most_one(count):
    for world in range(1, 9):
        shares = [MicroBatchBalancer(rank, world).own(range(10, 10 + count)) for rank in range(world)]
        assert [n for s in shares for n in s] == list(range(10, 10 + count))
        sizes = [len(s) for s in shares]
        assert max(sizes) - min(sizes) <= 1 and all(s.step == 1 for s in shares)


def test_a_resume_sees_the_rest_exactly_once_with_any_number_of_workers(index, plan):
    order, whole = seen(plan, range(len(plan))), every(index)
    again = build_epoch(synthetic_index(), LIMITS, 0, 0)  # built again after the restart
    for consumed in (0, 13, len(plan) // 2, len(plan) - 1):
        before = seen(plan, range(consumed))
        for world, global_batch in ((1, 4), (3, 7)):
            numbers = [n for rank in range(world) for n in worker_numbers(again, rank, world, global_batch, consumed)]
            after = seen(again, sorted(numbers))
            assert before + after == order and len(set(before) | set(after)) == len(before) + len(after) == len(whole)


def test_epochs_differ_and_the_same_seed_repeats(index, plan):
    def key(p):
        return p.index_rows.tobytes(), p.group_start.tobytes(), p.batch_start.tobytes()

    assert key(build_epoch(index, LIMITS, 0, 0)) == key(plan)
    others = {key(build_epoch(index, LIMITS, seed, epoch)) for seed, epoch in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1))}
    assert len(others) == 5


def test_neighbours_of_the_shards_are_not_neighbours_of_the_epoch(index, plan):
    """Row groups are permuted as a whole; which ones meet in a micro-batch differs from epoch to epoch."""
    places = [place[:2] for place in dict.fromkeys(s[:2] for s in seen(plan, range(len(plan))))]
    assert len(places) == len(set(every(index) and [(s, g) for s, g, _, _ in every(index)]))
    follows = sum(b == (a[0], a[1] + 1) for a, b in itertools.pairwise(places))
    assert follows < 0.02 * len(places)


def test_without_shuffling_the_order_is_that_of_the_shards(index):
    unshuffled = build_epoch(index, LIMITS, 5, 3, shuffle=False)
    assert unshuffled.index_rows.tolist() == list(range(len(index)))


@pytest.mark.parametrize(
    "limits",
    [
        PlanLimits(8, None, 1),
        PlanLimits(8, None, 8),
        PlanLimits(3, 200, 3),
        PlanLimits(64, 400, 16, 150),
        PlanLimits(1, None, 1),
        PlanLimits(16, 100, 16, 100),
        PlanLimits(64, 400, 16, 150, padded=False),
    ],
)
def test_limits_hold_and_micro_batches_are_filled(limits):
    index = synthetic_index(600, seed=3)
    plan = build_epoch(index, limits, 0, 0)
    column = {name: index[name].to_numpy() for name in index.column_names}
    assert plan.samples == len(index)
    lengths = []
    for start, stop in zip(plan.group_start, plan.group_start[1:], strict=False):
        lines = plan.index_rows[start:stop]
        assert (
            len({tuple(column[c][line] for c in ("shard", "row_group", "row")) for line in lines}) == 1
            and len(lines) <= limits.group
        )
        lengths.append(int(column["tokens"][lines].sum() - column["prefix"][lines[0]] * (len(lines) - 1)))
        if limits.length is not None:
            assert lengths[-1] <= limits.length or len(lines) == 1
    samples, budget = [], limits.tokens or 10**9
    for number in range(len(plan)):
        groups = range(plan.batch_start[number], plan.batch_start[number + 1])
        samples.append(int(plan.group_start[groups.stop] - plan.group_start[groups.start]))
        padded = max(lengths[g] for g in groups) * len(groups) if limits.padded else sum(lengths[g] for g in groups)
        assert padded == plan.tokens[number] <= budget and samples[-1] <= limits.samples
        if number:  # the first group of a micro-batch would not have fitted into the one before
            before = range(plan.batch_start[number - 1], plan.batch_start[number])
            size = int(plan.group_start[groups.start + 1] - plan.group_start[groups.start])
            together = [lengths[g] for g in [*before, groups.start]]
            assert (
                samples[-2] + size > limits.samples
                or (max(together) * len(together) if limits.padded else sum(together)) > budget
            )


def test_micro_batches_are_full(index):
    """What does not fit waits for the next one, so that the share of a step that is the same for any number of samples
    is well used.
    """
    for size in (8, 16, 64):
        plan = build_epoch(synthetic_index(2000, most=9), PlanLimits(size, None, size), 0, 0)
        assert plan.samples / len(plan) > 0.93 * size


def test_overlong_and_untrained_rows_are_left_out_and_none_is_an_error():
    index = synthetic_index(50)
    tokens, labels = index["tokens"].to_numpy().copy(), index["label_tokens"].to_numpy().copy()
    tokens[::3], labels[1::3] = 0, 0
    changed = index.set_column(4, "tokens", pa.array(tokens)).set_column(6, "label_tokens", pa.array(labels))
    plan = build_epoch(changed, LIMITS, 0, 0)
    assert sorted(plan.index_rows.tolist()) == [i for i in range(len(index)) if i % 3 == 2]
    none = index.set_column(4, "tokens", pa.array(np.zeros(len(index), np.int32)))
    with pytest.raises(PlanError, match=rf"none of {len(index)} conversations fits data.max_length"):
        build_epoch(none, LIMITS, 0, 0)


def test_data_of_another_kind_than_the_method_compares_are_refused():
    index = synthetic_index(50)
    for method in ("sft", "retrieval"):
        check_kind(index, method)
    with pytest.raises(PlanError, match=r"have no chosen and rejected answer, but method = dpo .* with method=sft or"):
        check_kind(index, "dpo")
    pairs = index.set_column(7, "chosen_tokens", pa.array(np.ones(len(index), np.int32)))
    for method in ("dpo", "simpo"):
        check_kind(pairs, method)
    for method in ("sft", "retrieval"):
        with pytest.raises(PlanError, match=rf"are preference data.*but method = {method} .* with method=dpo or"):
            check_kind(pairs, method)


def test_laying_200k_conversations_takes_less_than_two_seconds():
    index = synthetic_index(31_000, most=12)
    assert len(index) > 200_000
    began = time.process_time()
    plan = build_epoch(index, PlanLimits(64, 8192, 16, 2048), 0, 0)
    assert time.process_time() - began < 2 and plan.samples == len(index)


def run_config(tiny_path, size, **data):
    return RunConfig(
        model={"path": tiny_path}, data={"max_length": 1024, **data}, train={"per_device_train_batch_size": size}
    )


@pytest.mark.parametrize("packing", ["none", "image", "full"])
def test_label_tokens_of_the_plan_are_those_that_collate_yields(tmp_path, tiny_path, packing):
    rows = [
        *vqa_rows("train", 20),
        shard_row([], asked("two and two?", "four", 0)),
        shard_row([picture(60, 60)] * 2, asked("same?", "yes", 2)),
    ]
    folder, config = write_shards(str(tmp_path), rows, rows_per_file=9), run_config(tiny_path, 12, packing=packing)
    plan = build_epoch(local_index(folder, config), PlanLimits.of(config), 0, 0)
    reader = ShardReader.open(folder)
    encoder = cached_encoder(config.model, config.data, config.image)
    ids = []
    for number in range(len(plan)):
        batch = collate_training(reader.groups([plan.micro_batch(number)])[0], encoder)
        assert batch.label_tokens == plan.label_tokens[number] and batch.samples <= 12
        # conversations of a group may share more than the whole row does
        assert batch.input_ids.numel() <= plan.tokens[number]
        ids += batch.meta["ids"]
    assert sorted(ids) == sorted(c.id for r in rows for c in r.conversations)


def read_ratio(shards, config, world):
    """Bytes read / needed of a whole epoch, tasks and readers as in the stream: BATCHES_PER_TASK micro-batches of one
    worker.
    """
    folder, index = shards
    plan = build_epoch(index, PlanLimits.of(config), 0, 0)
    read = needed = 0
    for rank in range(world):
        reader, numbers = ShardReader.open(folder), worker_numbers(plan, rank, world, global_batch=world)
        for start in range(0, len(numbers), BATCHES_PER_TASK):
            reader.groups([plan.micro_batch(n) for n in numbers[start : start + BATCHES_PER_TASK]])
        read, needed = read + reader.bytes_read, needed + reader.bytes_needed
    return read / needed


@pytest.fixture(scope="module")
def photos(tmp_path_factory, tiny_path):
    """400 rows of JPEGs of 20 to 60 kB, one to nine questions each: (folder, index)."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(400):
        side = int(rng.integers(95, 160))
        image = picture(side, side, number, form="JPEG", quality=100, subsampling=0)
        assert 15_000 < len(image) < 65_000
        rows.append(
            shard_row([image], *(asked(f"question {q} of {number}?", "yes") for q in range(rng.integers(1, 10))))
        )
    folder = write_shards(str(tmp_path_factory.mktemp("photos")), rows, rows_per_file=100)
    return folder, local_index(folder, run_config(tiny_path, 8))


@pytest.fixture(scope="module")
def thumbnails(tmp_path_factory, tiny_path):
    """200 images of half a kilobyte, eight in a row group, ten questions each: (folder, index)."""
    folder = write_shards(str(tmp_path_factory.mktemp("thumbnails")), vqa_rows("train", 200), rows_per_file=100)
    return folder, local_index(folder, run_config(tiny_path, 8))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_photos_are_read_little_more_than_once(photos, tiny_path, world):
    for size in (4, 8, 32):
        assert read_ratio(photos, run_config(tiny_path, size), world) <= 1.5, size  # measured: 1.01 to 1.23


@pytest.mark.parametrize(("world", "size", "most"), [(1, 64, 1.5), (1, 8, 3.6), (4, 64, 2.4), (4, 8, 3.8)])
def test_thumbnails_are_read_in_whole_row_groups(thumbnails, tiny_path, world, size, most):
    """A row group of eight is 4 kB: read for the sake of one of them it costs less than the request, so the share may
    be larger.
    """
    assert 1 <= read_ratio(thumbnails, run_config(tiny_path, size, max_questions_per_image=32), world) <= most


def test_plans_are_built_when_they_are_reached_and_the_newest_is_kept(index):
    plans = EpochPlans(index, LIMITS, seed=3, epochs=10**9)
    assert len(plans) == 10**9
    first = plans[0]
    assert first is plans[0] and first.index_rows.tolist() == build_epoch(index, LIMITS, 3, 0).index_rows.tolist()
    gone = weakref.ref(first)
    del first
    assert plans[7].index_rows.tolist() == build_epoch(index, LIMITS, 3, 7).index_rows.tolist() and gone() is None
    with pytest.raises(PlanError, match="none of"):
        EpochPlans(index.set_column(4, "tokens", pa.array(np.zeros(len(index), np.int32))), LIMITS, 0, 1)


@pytest.mark.parametrize(
    ("most", "limits", "known"),
    [
        (1, PlanLimits(8, None, 8), True),
        (12, PlanLimits(7, None, 1), True),
        (12, PlanLimits(1, 100, 1), True),
        (1, PlanLimits(8, 8 * 100, 8), True),
        (1, PlanLimits(8, 300, 8), False),
        (12, PlanLimits(8, None, 8), False),
    ],
)
def test_micro_batches_are_known_without_a_plan_where_the_order_does_not_matter(most, limits, known):
    plans = EpochPlans(synthetic_index(1003, most=most), limits, 0, 5)
    assert (plans.micro_batches is not None) == known
    if known:
        assert {len(plan) for plan in plans} == {plans.micro_batches}


def test_the_order_of_an_epoch_is_that_of_every_version_before():
    """A digest of 528 plans, made by the version that built groups one by one: a run that has begun keeps its order."""
    limits = [
        *(PlanLimits(8, None, 1), PlanLimits(8, None, 8), PlanLimits(3, 200, 3), PlanLimits(64, 400, 16, 150)),
        *(PlanLimits(1, None, 1), PlanLimits(16, 100, 16, 100), PlanLimits(64, 400, 16, 150, padded=False)),
        *(PlanLimits(7, None, 3, 90), PlanLimits(8, 10**6, 1), PlanLimits(5, None, 5, 1000, False)),
        PlanLimits(4, 30, 2, 30),
    ]
    whole = ""
    for seed, most in itertools.product(range(4), (1, 3, 12)):
        index = synthetic_index(300 + seed * 117, seed, most)
        if seed == 2:
            tokens = index["tokens"].to_numpy().copy()
            tokens[::7] = 0
            index = index.set_column(4, "tokens", pa.array(tokens))
        for one, epoch, shuffle in itertools.product(limits, (0, 1), (True, False)):
            plan, digest = build_epoch(index, one, seed, epoch, shuffle), blake2b(digest_size=8)
            for name in ("index_rows", "group_start", "batch_start", "label_tokens", "chosen_tokens", "tokens"):
                digest.update(np.asarray(getattr(plan, name), np.int64).tobytes())
            whole += digest.hexdigest()
    assert blake2b(whole.encode(), digest_size=8).hexdigest() == "e98bba7045ae90e1"
