"""The ZeRO engine keeps no more copies of a gradient than the planner counts, and adapters in the run's dtype."""

import pytest

from smolray.config import load_config
from smolray.engine.base import Normalisers
from smolray.planner.shapes import Training
from tests.gloo import build_engine, run_workers

pytestmark = pytest.mark.seconds


def copies_in_the_step(path, overrides):
    """While the optimizer steps: 16-bit and fp32 gradients that exist, trained weights, and their dtypes."""
    config = load_config(None, [f"model.path={path}", "model.dtype=bfloat16", "engine.stage=0", *overrides])
    engine = build_engine(config)
    engine.accumulate((), 1, Normalisers(1, 1, 1))
    seen, step = [], engine.engine.step

    def watched():
        seen.append([sum(p.grad is not None for p in found.values()) for found in (engine.parameters, engine.masters)])
        return step()

    engine.engine.step = watched
    engine.step(1e-3)
    return seen, len(engine.parameters), sorted({str(p.dtype) for p in engine.parameters.values()})


@pytest.mark.parametrize("overrides", [[], ["lora.r=4", "model.train=[]"]], ids=["full", "lora"])
def test_at_stage_0_a_16_bit_gradient_is_free_once_it_is_converted(tiny_path, overrides):
    seen, number, dtypes = run_workers(copies_in_the_step, 1, tiny_path, overrides)
    assert seen == [[0, number]], "the fp32 gradients alone"
    assert dtypes == ["torch.bfloat16"]
    training = Training.of(load_config(None, ["model.dtype=bfloat16", *overrides]))
    assert training.trained_bytes == 2, "adapters have the compute dtype under ZeRO"
