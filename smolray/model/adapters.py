"""Which parameters train: frozen groups and LoRA, limited to the part of the model that is meant.

In: a loaded model and the run. Out: the model (a PeftModel with LoRA) whose `requires_grad` flags say what trains.
"""

import re
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn

from smolray.config import ConfigError, LoraConfig, RunConfig
from smolray.model.load import freeze, group_of


def base_model(model: nn.Module) -> Any:
    """The transformers model inside a PeftModel, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def prepare_for_training(model: nn.Module, config: RunConfig) -> nn.Module:
    """Freeze, quantisation housekeeping, LoRA and gradient checkpointing as the run says; LoRA's initial weights depend on the seed alone."""
    if config.model.load_in_4bit or config.model.load_in_8bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    freeze(model, config.model.train)
    if config.lora is not None:
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = get_peft_model(model, lora_config(model, config.lora))
        for name, parameter in base_model(model).named_parameters():
            if name.replace(".base_layer", "") in trained:
                parameter.requires_grad_(True)
    if config.model.gradient_checkpointing:
        base_model(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    return model


def lora_config(model: nn.Module, lora: LoraConfig) -> PeftLoraConfig:
    """PEFT's config, its targets spelt as full module names. Raises ConfigError where no module of a group matches."""
    pattern = re.compile(rf"(^|\.)({'|'.join(map(re.escape, lora.target_modules))})$")
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and pattern.search(name)]
    targets = [name for name in linear if group_of(name) in lora.groups]
    for group in lora.groups:
        if not any(group_of(name) == group for name in targets):
            raise ConfigError(f"lora.groups names {group!r}, but lora.target_modules = {list(lora.target_modules)} matches none of its linear layers")
    return PeftLoraConfig(
        r=lora.r, lora_alpha=lora.lora_alpha,  # type: ignore[arg-type]  # PEFT takes a float too
        lora_dropout=lora.lora_dropout, target_modules=targets,
        init_lora_weights="gaussian" if lora.init_lora_weights == "gaussian" else True, task_type="CAUSAL_LM",
    )  # fmt: skip


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name, tied ones once, in a stable order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
