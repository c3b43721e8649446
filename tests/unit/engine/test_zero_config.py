"""What DeepSpeed is told."""

import pytest

from smolray.config import RunConfig
from smolray.engine.zero_config import deepspeed_config


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_no_timer_waits_for_the_device_in_every_forward_pass(stage):
    told = deepspeed_config(RunConfig(engine={"stage": stage}), clip=True)
    assert told["timers"]["throughput"]["enabled"] is False
