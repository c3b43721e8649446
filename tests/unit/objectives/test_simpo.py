"""SimPO's loss and metrics: against numbers worked out by hand, and against TRL's CPOTrainer."""

import math
from types import SimpleNamespace

import pytest
import torch
from trl.experimental.cpo import CPOConfig, CPOTrainer

from smolray.config import ConfigError, RunConfig, SimPOConfig, load_config
from smolray.data.batch import Batch
from smolray.objectives.base import PREFERENCE_METRICS, Normalisers
from smolray.objectives.reference import reference_of
from smolray.objectives.registry import objective_of

# The probability that the model gives to each token of the answers: chosen, rejected, chosen, rejected.
ANSWERS = [[0.5, 0.25], [0.125], [0.1], [0.5, 0.8, 0.4]]


def batch_of(answers):
    """(hidden states of two values each, Batch): with the identity as head, the states are log-probabilities."""
    probabilities = torch.tensor([p for answer in answers for p in answer])
    completion = torch.tensor([i for i, answer in enumerate(answers) for _ in answer])
    none = torch.zeros(0, dtype=torch.int64)
    batch = Batch(
        input_ids=none,
        position_ids=none,
        branch=none,
        lengths=none,
        pixel_values=none,
        features=none,
        reference_logps=torch.zeros(0),
        tile_order=none,
        target_positions=torch.arange(len(completion)),
        target_ids=torch.ones_like(completion),
        target_completion=completion,
        ends=torch.zeros(len(answers), dtype=torch.int64),
    )
    return torch.stack([1 - probabilities, probabilities], dim=1).log(), batch


def simpo_of(settings, samples=2):
    hidden, batch = batch_of(ANSWERS)
    objective = objective_of(RunConfig(method="simpo", simpo=settings))
    return objective.loss(lambda states: states, hidden, batch, Normalisers(samples, label_tokens=7))


def test_simpo_equals_numbers_worked_out_by_hand():
    loss, metrics = simpo_of(SimPOConfig(beta=2.0, simpo_gamma=0.5))
    means = [
        (math.log(0.5) + math.log(0.25)) / 2,  # -1.0397
        math.log(0.125),  # -2.0794
        math.log(0.1),  # -2.3026
        (math.log(0.5) + math.log(0.8) + math.log(0.4)) / 3,  # -0.6109
    ]
    margins = [2 * (means[0] - means[1]), 2 * (means[2] - means[3])]  # 2.0794, -3.3834
    want = sum(math.log(1 + math.exp(-(margin - 0.5))) for margin in margins) / 2
    assert loss.item() == pytest.approx(want, rel=1e-6) and want == pytest.approx(2.0456, abs=1e-4)
    assert metrics["rewards/chosen"].item() == pytest.approx(means[0] + means[2])
    assert metrics["rewards/accuracies"].item() == 0.5
    assert metrics["logps/rejected"].item() == pytest.approx((means[1] + means[3]) / 2)


@pytest.mark.parametrize("settings", [SimPOConfig(), SimPOConfig(beta=2.5, simpo_gamma=1.4)])
def test_simpo_is_the_loss_of_trls_cpo_trainer(settings):
    chosen, rejected = (
        torch.stack([torch.tensor(answer).log().mean() for answer in ANSWERS[first::2]]) for first in (0, 1)
    )
    trainer = SimpleNamespace(
        loss_type="simpo",
        beta=settings.beta,
        simpo_gamma=settings.simpo_gamma,
        label_smoothing=0.0,
        alpha=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )
    losses, chosen_rewards, rejected_rewards = CPOTrainer.cpo_loss(trainer, chosen, rejected)

    loss, metrics = simpo_of(settings)
    assert loss.item() == pytest.approx(losses.mean().item(), rel=1e-6)
    assert metrics["rewards/chosen"].item() == pytest.approx(chosen_rewards.mean().item(), rel=1e-6)
    assert metrics["rewards/margins"].item() == pytest.approx(
        (chosen_rewards - rejected_rewards).mean().item(), rel=1e-6
    )
    assert tuple(metrics) == PREFERENCE_METRICS


def test_the_defaults_are_those_of_trl():
    defaults = {name: field.default for name, field in CPOConfig.__dataclass_fields__.items()}
    assert SimPOConfig().model_dump() == {name: defaults[name] for name in ("beta", "simpo_gamma")}


def test_contributions_of_micro_batches_add_up_to_the_step():
    whole, metrics = simpo_of(SimPOConfig())
    half, half_metrics = simpo_of(SimPOConfig(), samples=4)
    assert 2 * half.item() == pytest.approx(whole.item())
    assert all(2 * half_metrics[name].item() == pytest.approx(metrics[name].item()) for name in metrics)


def test_simpo_has_no_reference_model_and_keeps_dropout():
    config = load_config(
        None, ["method=simpo", "engine.stage=3", "lora={lora_dropout: 0.1}", "dpo.reference=precompute"]
    )
    assert config.reference_model == "none" and reference_of(torch.nn.Identity(), config) is None


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("engine=trl", "method = simpo with engine = trl"),
        ("data.overlong=truncate_text", "data.overlong = truncate_text with method = simpo"),
    ],
)
def test_what_simpo_cannot_do_is_refused(override, told):
    with pytest.raises(ConfigError, match=told):
        load_config(None, ["method=simpo", "image.upscale=true", override])
