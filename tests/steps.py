"""The metrics of a step, with whatever a test says of them."""

from typing import Any

from smolray.train.step import StepMetrics


def step_metrics(step: int, **fields: Any) -> StepMetrics:
    """Step `step` of ten, of one epoch."""
    usual = {
        "total_steps": 10,
        "position": (0, step),
        "epoch": step / 10,
        "loss": 1.0,
        "grad_norm": 2.0,
        "learning_rate": 1e-4,
        "samples": 8,
        "tokens": 100,
        "label_tokens": 10,
        "seconds": 0.5,
        "data_wait_seconds": 0.0,
        "memory_bytes": 7,
    }
    return StepMetrics(step=step, **usual | fields)
