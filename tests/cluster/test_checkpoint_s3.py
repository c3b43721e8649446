"""Checkpoints in an S3-compatible store: saved, found, skipped when damaged and pruned as on a local disk."""

import torch

from smolray import storage
from smolray.run import checkpoint
from smolray.run.checkpoint import Progress
from smolray.run.folder import RunFolder
from tests.unit.run.test_checkpoint import state_of

RUN = "s3://bucket/runs/one"


def save(step, **metrics):
    return checkpoint.save(RUN, state_of(step), Progress(step=step, data="abc"), metrics, {}).uri


def test_checkpoints_on_s3_behave_as_on_a_disk(s3_server):
    assert checkpoint.latest(RUN) is None and checkpoint.prune(RUN, 1, True) == []
    for step, accuracy in ((1, 0.9), (2, 0.1), (3, 0.2), (4, 0.3), (5, 0.4)):
        save(step, accuracy=accuracy)
    back = checkpoint.load_state(checkpoint.latest(RUN))
    assert all(torch.equal(back.weights[name], tensor) for name, tensor in state_of(5).weights.items())

    assert checkpoint.prune(RUN, 3, keep_best=True) == [2] and checkpoint.list_steps(RUN) == [1, 3, 4, 5]
    assert checkpoint.best(RUN).step == 1
    storage.delete(storage.join(RunFolder(RUN).checkpoint(5), "manifest.json"))
    data = bytearray(storage.read_bytes(uri := storage.join(RunFolder(RUN).checkpoint(4), "exp_avg.safetensors")))
    data[-1] ^= 1
    storage.write_bytes(uri, bytes(data))
    said: list[str] = []
    assert checkpoint.latest(RUN, said.append).step == 3
    assert "step-00000005 has no manifest.json" in said[0] and "exp_avg.safetensors does not have the hash" in said[1]

    save(5)
    assert checkpoint.latest(RUN).step == 5
    assert checkpoint.prune(RUN, 1, keep_best=False) == [1, 3, 4] and checkpoint.list_steps(RUN) == [5]
