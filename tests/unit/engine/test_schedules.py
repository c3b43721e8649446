"""Learning-rate schedules: those of transformers, each a function of the step."""

import pytest
import torch
from torch import nn

from smolray.config import OptimizerConfig, load_config
from smolray.engine.schedules import schedule

STEPS = 100
CASES = [
    ("linear", {}, 0.0),
    ("cosine", {}, 0.0),
    ("cosine", {"num_cycles": 1.3}, None),
    ("constant", {}, 1e-3),
    ("constant_with_warmup", {}, 1e-3),
    ("polynomial", {"lr_end": 1e-5, "power": 2.0}, 1e-5),
    ("polynomial", {}, 1e-7),
    ("cosine_with_restarts", {"num_cycles": 2}, 0.0),
    ("inverse_sqrt", {"timescale": 10}, None),
    ("inverse_sqrt", {}, None),
    ("cosine_with_min_lr", {"min_lr": 1e-4}, 1e-4),
    ("cosine_with_min_lr", {"min_lr_rate": 0.2, "num_cycles": 1}, None),
    ("warmup_stable_decay", {"num_decay_steps": 20, "min_lr_ratio": 0.1}, 1e-4),
    ("warmup_stable_decay", {"num_decay_steps": 20, "num_stable_steps": 30, "decay_type": "linear"}, 0.0),
    (
        "warmup_stable_decay",
        {"num_decay_steps": 40, "warmup_type": "cosine", "decay_type": "1-sqrt", "min_lr_ratio": 0.2},
        2e-4,
    ),
    ("warmup_stable_decay", {"num_decay_steps": 40, "warmup_type": "1-sqrt", "num_cycles": 0.25}, None),
]


@pytest.mark.parametrize("warmup", ["optimizer.warmup_steps=10", "optimizer.warmup_ratio=0"], ids=["warmup", "none"])
@pytest.mark.parametrize(("kind", "settings", "last"), CASES, ids=str)
@pytest.mark.filterwarnings("ignore:Both num_training_steps")
def test_every_schedule_is_that_of_transformers_to_the_last_digit(kind, settings, last, warmup):
    from transformers import get_scheduler

    config = load_config(
        None,
        [
            "optimizer.learning_rate=1e-3",
            warmup,
            f"optimizer.lr_scheduler_type={kind}",
            f"optimizer.lr_scheduler_kwargs={settings}".replace("'", ""),
        ],
    ).optimizer
    rate = schedule(config, STEPS)
    carrier = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    theirs = get_scheduler(kind, carrier, config.warmup_steps, STEPS, settings).lr_lambdas[0]
    for step in [*range(STEPS + 3), 7, 0]:  # asked again it is the same
        assert rate(step) == 1e-3 * theirs(step), step
    assert rate(config.warmup_steps) == pytest.approx(1e-3)
    if last is not None:
        assert rate(STEPS) == pytest.approx(last, abs=1e-12)


def test_a_zero_learning_rate_stays_zero():
    assert schedule(OptimizerConfig(learning_rate=0.0, lr_scheduler_type="constant"), STEPS)(50) == 0.0
