"""Optimizers and schedules: what each group of parameters gets, and that 8-bit states are kept and put back as they
are.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from smolray.config import OptimizerConfig, load_config
from smolray.engine.optim import (
    CODES,
    FP32,
    build_optimizer,
    dequantised,
    moments,
    optimizer_step,
    schedule,
    set_learning_rate,
    set_moments,
)
from smolray.planner.memory import Workload
from smolray.run.state import StateMismatchError

STEPS = 100
OPTIMIZERS = ["adamw", "adamw_8bit", "lion", "lion_8bit", "adafactor", "muon"]  # paged ones need a GPU
NO_LORA = SimpleNamespace(lora=None)
OF_WIDTH_512 = SimpleNamespace(text=SimpleNamespace(hidden=512))


def parameters(seed=0):
    """A large matrix of each group, a bias, and an embedding."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "model.vision_model.fc.weight": (64, 96),
        "model.connector.proj.weight": (96, 64),
        "model.text_model.q.weight": (96, 96),
        "model.text_model.q.bias": (96,),
        "model.text_model.embed_tokens.weight": (100, 96),
    }
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def train(optimizer, found, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in found.values():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
def test_each_group_follows_the_schedule_with_its_own_rate_and_decay(name):
    found = parameters()
    config = OptimizerConfig(
        name=name, learning_rate=1e-3, learning_rates={"vision": 1e-4, "connector": 5e-3}, weight_decay=0.1
    )
    optimizer = build_optimizer(found, config)
    set_learning_rate(optimizer, 2e-4)  # a fifth of the way up
    got = {
        n: next((g["lr"], g["weight_decay"]) for g in optimizer.param_groups if any(q is p for q in g["params"]))
        for n, p in found.items()
    }
    assert [pytest.approx(rate) for rate, _ in got.values()] == [2e-5, 1e-3, 2e-4, 2e-4, 2e-4]
    assert [decay for _, decay in got.values()] == [0.1, 0.1, 0.1, 0.0, 0.1]


SCHEDULES = {
    "linear": {},
    "cosine": {},
    "constant": {},
    "constant_with_warmup": {},
    "polynomial": {"lr_end": 1e-5, "power": 2.0},
    "cosine_with_restarts": {"num_cycles": 2},
    "inverse_sqrt": {"timescale": 10},
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "warmup_stable_decay": {"num_decay_steps": 20, "min_lr_ratio": 0.1},
}
LAST = {
    "linear": 0.0,
    "cosine": 0.0,
    "constant": 1e-3,
    "constant_with_warmup": 1e-3,
    "polynomial": 1e-5,
    "cosine_with_min_lr": 1e-4,
    "warmup_stable_decay": 1e-4,
    "inverse_sqrt": 1e-3 / 10**0.5,
    "cosine_with_restarts": 0.0,
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_every_schedule_is_that_of_transformers_as_a_function(kind):
    from transformers import get_scheduler

    config = load_config(
        None,
        [
            "optimizer.learning_rate=1e-3",
            "optimizer.warmup_steps=10",
            f"optimizer.lr_scheduler_type={kind}",
            f"optimizer.lr_scheduler_kwargs={SCHEDULES[kind]}".replace("'", ""),
        ],
    ).optimizer
    rate = schedule(config, STEPS)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    theirs = get_scheduler(kind, optimizer, 10, STEPS, SCHEDULES[kind])
    for step in range(STEPS):
        assert rate(step) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert rate(STEPS) == pytest.approx(LAST[kind], abs=2e-5) and rate(10) == pytest.approx(1e-3)
    assert rate(3) == rate(3), "asked again it is the same"
    assert rate(3) == pytest.approx({"constant": 1e-3, "warmup_stable_decay": 3.7e-4}.get(kind, 3e-4))


def test_a_zero_learning_rate_stays_zero():
    assert schedule(OptimizerConfig(learning_rate=0.0, lr_scheduler_type="constant"), STEPS)(50) == 0.0


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_embeddings_and_small_parameters_have_fp32_adam_states(name):
    found = parameters()
    optimizer = build_optimizer(found, OptimizerConfig(name=name))
    train(optimizer, found, 1)
    kept = {n: set(moments(optimizer, p)) for n, p in found.items()}
    assert [kept[n] == set(CODES) for n in found] == [True, True, True, False, False]
    assert kept["model.text_model.embed_tokens.weight"] == kept["model.text_model.q.bias"] == set(FP32)
    assert {v.dtype for v in moments(optimizer, found["model.text_model.q.weight"]).values()} == {
        torch.uint8,
        torch.float32,
    }


def test_every_optimizer_lowers_a_loss():
    for name in OPTIMIZERS:
        found = parameters()
        optimizer = build_optimizer(found, OptimizerConfig(name=name, learning_rate=1e-3))
        for _ in range(3):
            for p in found.values():
                p.grad = p.detach().clone()  # of half the square of each
            optimizer.step()
        assert all((p**2).mean() < (q**2).mean() for p, q in zip(found.values(), parameters().values(), strict=True))


def test_muon_moves_the_matrices_and_adamw_the_rest():
    found = parameters() | {"lm_head.weight": nn.Parameter(torch.randn(100, 96))}
    optimizer = build_optimizer(found, OptimizerConfig(name="muon", weight_decay=0.1))
    kept = {name: set(moments(optimizer, p)) for name, p in found.items()}
    adamw = [name for name, keys in kept.items() if keys == set(FP32)]
    assert [name.rsplit(".", 2)[-2:] for name in adamw] == [
        ["q", "bias"],
        ["embed_tokens", "weight"],
        ["lm_head", "weight"],
    ]
    assert all(kept[name] == {"momentum_buffer"} for name in found if name not in adamw)
    train(optimizer, found, 2)
    assert {name: set(moments(optimizer, p)) for name, p in found.items()} == kept
    set_learning_rate(optimizer, 0.0)
    before = {name: p.detach().clone() for name, p in found.items()}
    train(optimizer, found, 1)
    assert all(torch.equal(found[name], before[name]) for name in found)


@pytest.mark.parametrize("name", ["muon", "adafactor", "lion", "lion_8bit"])
def test_the_state_of_another_optimizer_is_refused(name):
    found = parameters()
    other, adamw = (build_optimizer(found, OptimizerConfig(name=one)) for one in (name, "adamw"))
    matrix = found["model.text_model.q.weight"]
    for saved, restored in ((other, adamw), (adamw, other)):
        with pytest.raises(StateMismatchError, match=r"optimizer\.name has changed; continue with the one"):
            set_moments(restored, matrix, moments(saved, matrix), 3)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "lion", "lion_8bit", "adafactor", "muon"])
def test_the_planner_counts_the_bytes_of_the_states(name):
    shape = (512, 512)
    found = {"model.text_model.q.weight": nn.Parameter(torch.randn(shape))}
    optimizer = build_optimizer(found, OptimizerConfig(name=name))
    train(optimizer, found, 1)
    kept = sum(value.nbytes for value in moments(optimizer, *found.values()).values())
    counted = Workload.state_bytes.fget(SimpleNamespace(optimizer=name, training=NO_LORA, shape=OF_WIDTH_512))[0]
    assert counted * 512 * 512 == pytest.approx(kept, rel=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restored_moments_continue_to_the_same_bits(name):
    found, again = parameters(), parameters()
    config = OptimizerConfig(name=name, learning_rate=1e-2, weight_decay=0.1)
    first, second = build_optimizer(found, config), build_optimizer(again, config)
    train(first, found, 3)
    for n, p in found.items():
        with torch.no_grad():
            again[n].copy_(p)
        set_moments(second, again[n], {k: v.clone() for k, v in moments(first, p).items()}, optimizer_step(first))
    train(first, found, 3, seed=2)
    train(second, again, 3, seed=2)
    assert optimizer_step(first) == optimizer_step(second) == 6
    assert {n: set(moments(first, p)) for n, p in found.items()} == {
        n: set(moments(second, p)) for n, p in again.items()
    }
    for n in found:
        assert torch.equal(found[n], again[n]), n


@pytest.mark.parametrize(
    ("before", "after"),
    [("adamw_8bit", "adamw"), ("adamw", "adamw_8bit"), ("lion", "lion_8bit"), ("lion_8bit", "lion")],
)
def test_moments_are_converted_between_8_bit_and_fp32(before, after):
    found = parameters()
    first, second = (build_optimizer(found, OptimizerConfig(name=name, learning_rate=0.0)) for name in (before, after))
    train(first, found, 3)
    for p in found.values():
        set_moments(second, p, moments(first, p), 3)
        want, got = dequantised(moments(first, p)), dequantised(moments(second, p))
        for key in want:
            assert (got[key] - want[key]).norm() <= 0.03 * want[key].norm(), "codes of 8 bits keep about two digits"
    assert optimizer_step(second) == 3


def test_lora_plus_gives_the_b_matrices_a_rate_of_their_own():
    names = ("model.text_model.q.lora_A.default.weight", "model.text_model.q.lora_B.default.weight")
    found = {name: nn.Parameter(torch.ones(4, 4)) for name in names}
    optimizer = build_optimizer(found, OptimizerConfig(learning_rate=1e-4, loraplus_lr_ratio=16))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert [rates[id(found[name])] for name in names] == pytest.approx([1e-4, 1.6e-3])
    set_learning_rate(optimizer, 5e-5)  # both follow the schedule
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert [rates[id(found[name])] for name in names] == pytest.approx([5e-5, 8e-4])
