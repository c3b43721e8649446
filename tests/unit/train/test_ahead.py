"""The next step's first micro-batch is on the device before the work of this step is waited for."""

from dataclasses import replace

import pytest
import torch

from smolray.engine.zero import dummy_batch
from smolray.train.ahead import BatchesAhead

ELSEWHERE = torch.device("meta")


def trained(batches, steps):
    """What happens in steps of so many micro-batches, and the micro-batches that were trained."""
    happened, seen = [], []
    empty = dummy_batch(torch.device("cpu"), False, True)

    def stream():
        for number in range(sum(steps)):
            happened.append(f"read {number}")
            yield replace(empty, meta={"number": number})

    ahead = BatchesAhead(stream(), batches)
    for count in steps:
        for batch in ahead.take(count):
            happened.append(f"launch {batch.meta['number']}")
            seen.append(batch)
        happened.append("wait")
    return happened, seen


def test_the_next_step_is_read_and_copied_after_the_last_launch_and_before_the_wait():
    happened, seen = trained(ELSEWHERE, [2, 1])
    assert happened == ["read 0", "launch 0", "read 1", "launch 1", "read 2", "wait", "launch 2", "wait"]
    assert [batch.input_ids.device.type for batch in seen] == ["cpu", "cpu", "meta"]


def test_without_a_device_nothing_is_read_ahead():
    happened, seen = trained(None, [2, 1])
    assert happened == ["read 0", "launch 0", "read 1", "launch 1", "wait", "read 2", "launch 2", "wait"]
    assert {batch.input_ids.device.type for batch in seen} == {"cpu"}


@pytest.mark.parametrize("device", [None, ELSEWHERE])
@pytest.mark.parametrize("steps", [[1, 1, 1], [3, 0, 2, 0, 0, 1], [0, 2], [4]])
def test_every_micro_batch_is_trained_once_in_its_order(device, steps):
    """Balancing by speed may give a worker no micro-batch in a step."""
    _, seen = trained(device, steps)
    assert [batch.meta["number"] for batch in seen] == list(range(sum(steps)))
