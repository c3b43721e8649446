"""What DeepSpeed is told."""

import deepspeed
import pytest
from deepspeed.comm.torch import build_shm_op

from smolray.config import RunConfig
from smolray.engine.zero import compile_nothing
from smolray.engine.zero_config import deepspeed_config


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_no_timer_waits_for_the_device_in_every_forward_pass(stage):
    told = deepspeed_config(RunConfig(engine={"stage": stage}), clip=True)
    assert told["timers"]["throughput"]["enabled"] is False


def test_deepspeed_compiles_nothing_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert deepspeed.ops.__compatible_ops__ is not None  # found out, as any other use of DeepSpeed would
    compile_nothing()
    assert build_shm_op() is None
    assert not list(tmp_path.iterdir())
