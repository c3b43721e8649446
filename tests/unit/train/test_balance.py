"""Micro-batches dealt by speed: who is twice as fast takes twice as many, every one is taken, and shares change only
between runs of steps.
"""

import torch

from smolray.train.balance import MEASURED, WARM_UP, MicroBatchBalancer

STEPS = [range(s, s + 5) for s in range(0, 50, 5)]


def test_a_step_is_dealt_by_speed_and_whole():
    fast, slow = (MicroBatchBalancer(rank, 2, speeds=(3.0, 2.0)) for rank in (0, 1))
    assert fast.counts(5) == slow.counts(5) == (3, 2)
    assert [*fast.own(range(10, 15)), *slow.own(range(10, 15))] == list(range(10, 15))
    assert MicroBatchBalancer(0, 2).counts(5) == (3, 2) and MicroBatchBalancer(0, 3).counts(2) == (1, 1, 0)


def test_the_first_steps_are_a_run_of_their_own_while_they_are_measured_even_over_the_end_of_an_epoch():
    balancer = MicroBatchBalancer(0, 2, measure=True)
    assert [len(span) for span in balancer.spans(STEPS)] == [WARM_UP + MEASURED, len(STEPS) - WARM_UP - MEASURED]
    for _ in range(3):
        balancer.observe(100, 1.0, 5, torch.device("cpu"))
    assert [len(span) for span in balancer.spans(STEPS[:2])] == [2], "the epoch ends first"
    assert [len(span) for span in balancer.spans(STEPS)] == [
        WARM_UP + MEASURED - 3,
        len(STEPS) - WARM_UP - MEASURED + 3,
    ]


def test_alone_or_where_nothing_is_measured_an_epoch_is_one_run():
    for balancer in (MicroBatchBalancer(0, 1, measure=True), MicroBatchBalancer(0, 2)):
        assert [len(span) for span in balancer.spans(STEPS)] == [len(STEPS)]
    assert list(MicroBatchBalancer(0, 2).spans([])) == []
