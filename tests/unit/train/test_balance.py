"""Load balancing: a worker twice as fast takes twice as many micro-batches, each is taken once, and counts change only
between parts of an epoch.
"""

import torch

from smolray.train.balance import MEASURED, WARM_UP, MicroBatchBalancer

STEPS = [range(s, s + 5) for s in range(0, 50, 5)]


def test_faster_workers_take_more_and_every_micro_batch_is_taken():
    fast, slow = (MicroBatchBalancer(rank, 2, speeds=(3.0, 2.0)) for rank in (0, 1))
    assert fast.counts(5) == slow.counts(5) == (3, 2)
    assert [*fast.own(range(10, 15)), *slow.own(range(10, 15))] == list(range(10, 15))
    assert MicroBatchBalancer(0, 2).counts(5) == (3, 2) and MicroBatchBalancer(0, 3).counts(2) == (1, 1, 0)


def test_steps_that_are_timed_are_a_part_of_their_own():
    balancer = MicroBatchBalancer(0, 2, measure=True)
    assert [len(span) for span in balancer.spans(STEPS)] == [WARM_UP + MEASURED, len(STEPS) - WARM_UP - MEASURED]
    for _ in range(3):
        balancer.observe(100, 1.0, 5, torch.device("cpu"))
    assert [len(span) for span in balancer.spans(STEPS[:2])] == [2], "the epoch ends first"
    assert [len(span) for span in balancer.spans(STEPS)] == [
        WARM_UP + MEASURED - 3,
        len(STEPS) - WARM_UP - MEASURED + 3,
    ]


def test_an_epoch_is_one_part_where_nothing_is_timed():
    for balancer in (MicroBatchBalancer(0, 1, measure=True), MicroBatchBalancer(0, 2)):
        assert [len(span) for span in balancer.spans(STEPS)] == [len(STEPS)]
    assert list(MicroBatchBalancer(0, 2).spans([])) == []
