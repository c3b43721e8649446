"""Balancing is optimal, pipeline schedules are those of torch, and simulated times keep their known limits."""

import itertools
import random
from types import SimpleNamespace

import pytest
from torch.distributed.pipelining import ScheduleInterleaved1F1B

from smolray.planner.inventory import Interconnect
from smolray.planner.schedule import (
    StageTimes,
    accepted_micro_batches,
    balance,
    in_flight,
    least_seconds,
    operations,
    simulate,
)
from smolray.planner.time import ring_seconds


def test_a_4090_takes_three_where_a_3090_takes_two():
    assert balance([3.0, 2.0], 5) == (3, 2)
    assert balance([3.0, 2.0], 10) == (6, 4)
    assert balance([1.0, 1.0, 1.0], 7) == (3, 2, 2)
    assert balance([100.0, 1.0], 4) == (4, 0), "a GPU that the others would wait for gets none"


def test_no_other_shares_finish_earlier():
    rng = random.Random(0)
    for _ in range(300):
        speeds = [rng.uniform(0.2, 5) for _ in range(rng.randint(1, 4))]
        count = rng.randint(1, 7)
        shares = balance(speeds, count)
        assert sum(shares) == count
        every = (s for s in itertools.product(range(count + 1), repeat=len(speeds)) if sum(s) == count)
        best = min(max(n / speed for n, speed in zip(s, speeds, strict=True)) for s in every)
        assert max(n / speed for n, speed in zip(shares, speeds, strict=True)) == pytest.approx(best)


def test_equal_workers_and_many_micro_batches_are_balanced_as_one_by_one():
    rng = random.Random(2)
    for _ in range(500):
        kinds = [rng.choice((rng.uniform(0.1, 9), rng.randint(1, 6) / 2)) for _ in range(rng.randint(1, 4))]
        speeds, count = [rng.choice(kinds) for _ in range(rng.randint(1, 12))], rng.randint(0, 60)
        expected = [0] * len(speeds)
        for _ in range(count):  # to the worker that would finish it first
            expected[min(range(len(speeds)), key=lambda i: ((expected[i] + 1) / speeds[i], i))] += 1
        assert balance(speeds, count) == tuple(expected), (speeds, count)


@pytest.mark.parametrize(
    ("stages", "micro_batches"), [(2, 2), (2, 4), (2, 7), (3, 4), (4, 4), (4, 10), (4, 12), (5, 3)]
)
def test_operations_and_accepted_numbers_are_those_of_torch(stages, micro_batches):
    count = accepted_micro_batches(micro_batches, stages, "interleaved_1f1b")
    assert count % max(1, count // stages) == 0
    for rank in range(stages):
        rounds = max(1, count // stages)
        schedule = SimpleNamespace(
            pp_group_size=stages,
            n_local_stages=1,
            _n_microbatches=count,
            number_of_rounds=rounds,
            microbatches_per_round=count // rounds,
            rank=rank,
        )
        actions = ScheduleInterleaved1F1B._calculate_single_rank_operations(schedule, rank)
        torchs = [
            ("F" if a.computation_type.name == "FORWARD" else "B", a.microbatch_index) for a in actions if a is not None
        ]
        assert operations(rank, stages, count, "interleaved_1f1b") == torchs


def test_a_schedule_gets_a_number_of_micro_batches_that_it_accepts():
    """Interleaved1F1B's own rule (torch 2.13): a multiple of its rounds."""
    for stages, wanted in itertools.product(range(1, 6), range(1, 40)):
        count = accepted_micro_batches(wanted, stages, "interleaved_1f1b")
        assert wanted <= count < wanted + stages and count % max(1, count // stages) == 0
    assert accepted_micro_batches(5, 2, "gpipe") == 5


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "gpipe"])
def test_in_flight_is_what_the_operations_keep(schedule):
    for stages, micro_batches in itertools.product(range(1, 5), range(1, 10)):
        for stage in range(stages):
            kept = most = 0
            for kind, _ in operations(stage, stages, micro_batches, schedule):
                kept += 1 if kind == "F" else -1
                most = max(most, kept)
            assert most == in_flight(stage, stages, micro_batches, schedule)


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "gpipe"])
def test_equal_stages_on_free_links_take_the_known_time(schedule):
    """(micro-batches + stages - 1) x (forward + backward): Narayanan et al. 2021, section 2.2.1, for both schedules."""
    for stages, micro_batches in itertools.product((1, 2, 4), (1, 4, 8)):
        seconds = simulate([StageTimes(1.0, 2.0)] * stages, micro_batches, schedule)
        assert seconds == pytest.approx((micro_batches + stages - 1) * 3.0)


def test_a_slow_link_is_hidden_until_it_is_the_bottleneck():
    def step(send: float) -> float:
        return simulate([StageTimes(1.0, 2.0, send=send), StageTimes(1.0, 2.0, back=send)], 16)

    assert step(0.5) == pytest.approx(step(0.0), rel=0.05), "transfers run while the stages compute"
    assert step(6.0) > 16 * 6.0, "a link carries one message at a time"


def test_a_step_lies_between_its_slowest_stage_and_all_stages_in_turn():
    rng = random.Random(1)
    for _ in range(200):
        stages = [StageTimes(*(rng.uniform(0.1, 2) for _ in range(4))) for _ in range(rng.randint(1, 5))]
        count = accepted_micro_batches(rng.randint(1, 9), len(stages), "interleaved_1f1b")
        for schedule in ("interleaved_1f1b", "gpipe"):
            seconds = simulate(stages, count, schedule)
            assert seconds >= least_seconds(stages, count) - 1e-9
            assert least_seconds(stages, count) >= max(count * (s.forward + s.backward) for s in stages)
            assert seconds <= count * sum(s.forward + s.backward + s.send + s.back for s in stages) + 1e-9


def test_ring_times_are_those_measured_at_a_gigabit():
    """Two namespaces, gloo, 16 MB: 147 ms at 1 Gbit/s, 1,615 ms at 100 Mbit/s."""
    assert ring_seconds(16e6, 2, Interconnect(1e9 / 8, 1e-4)) == pytest.approx(0.147, rel=0.1)
    assert ring_seconds(16e6, 2, Interconnect(1e8 / 8, 1e-4)) == pytest.approx(1.615, rel=0.1)
    assert ring_seconds(16e6, 1, Interconnect(1e9 / 8, 1e-4)) == 0
    assert ring_seconds(16e6, 8, Interconnect(1e9 / 8, 0)) == pytest.approx(2 * 7 / 8 * 16e6 / (1e9 / 8 * 0.85))
