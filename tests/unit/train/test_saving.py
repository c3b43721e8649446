"""Training goes on while a checkpoint is written; what goes wrong there is told, and costs no older checkpoint."""

import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from smolray import storage
from smolray.config import ConfigError, RunConfig
from smolray.data.reader import Folders
from smolray.engine.base import LocalSums
from smolray.run import checkpoint
from smolray.run.checkpoint import CheckpointError, Progress
from smolray.run.lease import LeaseLostError, owning
from smolray.run.state import EngineState
from smolray.train.collective import gather
from smolray.train.hooks import RunHooks, RunLog
from smolray.train.saving import CheckpointWriter
from smolray.train.step import StepInfo, StepMetrics
from tests.gloo import run_workers

PROGRESS = Progress(step=1, epoch=0, consumed=3, samples=10, tokens=100, data="abc")


def state_of(value: float) -> EngineState:
    return EngineState(*({"weight": torch.full((4, 3), value)} for _ in range(3)))


@pytest.fixture
def config(tmp_path):
    return RunConfig.model_validate({"name": "run", "storage": str(tmp_path), "checkpoint": {"save_total_limit": 2}})


@pytest.fixture
def writer(config):
    """Of the driver that owns the run."""
    with owning(config.run_dir, "train") as lease:
        writer = CheckpointWriter(config, lease.id)
        yield writer
        writer.close()


@pytest.fixture
def disk(monkeypatch):
    """A disk that takes nothing before this event is set."""
    ready, write = threading.Event(), storage.write_bytes

    def wait(uri, data):
        assert ready.wait(20)
        write(uri, data)

    monkeypatch.setattr(storage, "write_bytes", wait)
    yield ready
    ready.set()


def save(writer, step, value=1.0):
    writer.start(state_of(value), replace(PROGRESS, step=step), {"loss": 0.5})


def test_training_goes_on_while_a_checkpoint_is_written(writer, config, disk):
    save(writer, 1)
    assert not writer.ready() and not writer.failed()
    assert checkpoint.latest(config.run_dir) is None, "it is not whole yet"

    disk.set()
    saved = writer.collect()
    assert saved == checkpoint.latest(config.run_dir) and saved.step == 1 and saved.metrics == {"loss": 0.5}
    assert torch.equal(checkpoint.load_state(saved).weights["weight"], torch.ones(4, 3))
    assert writer.collect() is None, "it is told once"


def test_a_checkpoint_is_whole_before_the_next_one_begins(writer, config, disk):
    save(writer, 1)
    threading.Timer(0.2, disk.set).start()
    first = writer.collect()
    save(writer, 2)
    assert (first.step, writer.collect().step) == (1, 2)
    assert checkpoint.list_steps(config.run_dir) == [1, 2]


def test_a_training_that_fails_leaves_the_checkpoint_before_it_whole(writer, config, disk):
    save(writer, 1)
    threading.Timer(0.2, disk.set).start()
    writer.close()
    assert checkpoint.latest(config.run_dir).step == 1


def test_what_cannot_be_saved_is_told_and_the_older_one_stays(writer, config):
    save(writer, 1)
    writer.collect()
    save(writer, 2, float("nan"))
    writer.close()
    assert writer.failed() and not writer.ready()
    with pytest.raises(CheckpointError, match="holds nan or infinite values"):
        writer.collect()
    assert not writer.failed() and checkpoint.latest(config.run_dir).step == 1


def test_a_driver_that_has_lost_the_run_saves_nothing(config):
    with owning(config.run_dir, "train"):
        writer = CheckpointWriter(config, "another driver")
        save(writer, 1)
        with pytest.raises(LeaseLostError):
            writer.collect()
    assert checkpoint.list_steps(config.run_dir) == []


def test_checkpoints_that_the_run_does_not_keep_are_deleted_with_the_writing(writer, config):
    for step in range(1, 5):
        save(writer, step)
        writer.collect()
    assert checkpoint.list_steps(config.run_dir) == [3, 4]


def save_a_nan(run):
    """Two workers save after two steps; what rank 0 writes first is not finite."""
    config = RunConfig.model_validate(run | {"checkpoint": {"save_steps": 1}})
    with owning(config.run_dir, "train") if dist.get_rank() == 0 else nullcontext(SimpleNamespace(id="")) as lease:
        writer, engine = CheckpointWriter(config, lease.id), SimpleNamespace(state=lambda: state_of(float("nan")))
        hooks = RunHooks(config, Folders(""), torch.device("cpu"), engine, RunLog(config.run_dir), None, writer)
        hooks.save_and_evaluate(step_of(1))  # it goes on
        deadline = time.monotonic() + 20
        while dist.get_rank() == 0 and not writer.failed() and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            hooks.save_and_evaluate(step_of(2))
            told = ""
        except ConfigError as error:
            told = str(error)
        return gather(told)


def step_of(step):
    metrics = StepMetrics(step, 9, (0, step), 0.1, 1.0, 1.0, 1e-3, 1, 1, 1, 0.1, 0.0, 1)
    return StepInfo(
        replace(PROGRESS, step=step), metrics, LocalSums(torch.zeros(()), torch.zeros(0)), False, False, False
    )


def test_a_write_that_failed_ends_the_run_on_every_worker(tmp_path):
    told = run_workers(save_a_nan, 2, {"name": "run", "storage": str(tmp_path)})
    assert len(told) == 2 and all("worker 0" in one and "holds nan or infinite values" in one for one in told)
    assert checkpoint.list_steps(str(tmp_path / "run")) == []
