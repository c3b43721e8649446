"""Optimizers and schedules, both free of the number of workers: a schedule is a function of the step alone."""

from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers import get_scheduler

from smolray.config import OptimizerConfig


def build_optimizer(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW; biases and norms are not decayed, as in transformers' Trainer. Fused where all parameters are on CUDA."""
    decayed = [p for n, p in parameters.items() if p.ndim >= 2]
    plain = [p for n, p in parameters.items() if p.ndim < 2]
    groups = [{"params": g, "weight_decay": d} for g, d in ((decayed, config.weight_decay), (plain, 0.0)) if g]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon,
        fused=all(p.is_cuda for p in parameters.values()),
    )  # fmt: skip


def schedule(config: OptimizerConfig, total_steps: int) -> Callable[[int], float]:
    """Learning rate of optimizer step n (0, 1, …): transformers' schedule as a function."""
    warmup = config.warmup_steps or round(config.warmup_ratio * total_steps)
    carrier = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(config.lr_scheduler_type, carrier, num_warmup_steps=warmup, num_training_steps=total_steps)
    factor = scheduler.lr_lambdas[0]
    return lambda step: config.learning_rate * float(factor(step))
