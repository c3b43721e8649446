"""What the workers of a run decide together is the same on all of them."""

import pytest
import torch
import torch.distributed as dist

from smolray.config import ConfigError
from smolray.train.collective import agree, broadcast, gather
from smolray.train.step import StopPoll, sum_over_workers
from tests.gloo import run_workers

pytestmark = pytest.mark.seconds


def decide():
    """All that two workers decide together; rank 1 alone has a fault, rank 0 alone is requested to stop."""
    rank = dist.get_rank()

    def work():
        if rank == 1:
            raise ConfigError("no such device")
        return "loaded"

    try:
        agree(work)
        fault = ""
    except ConfigError as error:
        fault = str(error)

    poll, reductions, plain = StopPoll(lambda: True), [], dist.all_reduce
    dist.all_reduce = lambda *args, **options: reductions.append(1) or plain(*args, **options)
    numbers = {"loss": torch.tensor(1.5 + rank, dtype=torch.float64), "stop": float(poll())}
    sums = sum_over_workers(numbers, torch.device("cpu")) | {"reductions": len(reductions)}
    dist.all_reduce = plain
    found = {"agreed": agree(lambda: rank), "fault": fault, "sums": sums, "polled_at_once": poll()}
    return gather(found | {"broadcast": broadcast(rank)})


@pytest.fixture(scope="module")
def found():
    return run_workers(decide, 2)


def test_a_fault_of_one_worker_is_raised_on_all(found):
    assert [one["fault"] for one in found] == ["worker 1: no such device"] * 2
    assert [one["agreed"] for one in found] == [0, 1], "without a fault each has its own result"


def test_a_request_to_stop_reaches_all_workers_with_the_sums(found):
    for one in found:
        assert one["sums"]["loss"] == 4.0 and one["sums"]["stop"] == 1.0
        assert one["sums"]["reductions"] == 1, "a message for each costs more than its bytes"
        assert one["sums"]["memory"] == found[0]["sums"]["memory"] > 2**20
    assert not found[0]["polled_at_once"], "the flag is not looked for in every step"


def test_broadcast_gives_the_value_of_rank_0(found):
    assert [one["broadcast"] for one in found] == [0, 0]
