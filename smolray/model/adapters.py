"""Which parameters are trained: model groups, adapters (LoRA, DoRA, rsLoRA), and modules beside adapters.

In: a loaded model and the run. Out: the model (a PeftModel with LoRA), its `requires_grad` flags set.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from smolray.config import ConfigError, LoraConfig, ModelGroup, RunConfig
from smolray.model.load import base_model, freeze, group_of

if TYPE_CHECKING:  # PEFT takes two seconds at the start of every process, and only LoRA needs it
    from peft import LoraConfig as PeftLoraConfig

# How PEFT's patterns spell a group (model/load.py, group_of).
MODULES_OF: dict[ModelGroup, str] = {
    "vision": r".*vision_model\..*",
    "connector": r".*connector\..*",
    "text": r".*text_model\..*|lm_head",
}


def prepare_for_training(model: nn.Module, config: RunConfig) -> nn.Module:
    """Apply freezing, LoRA and gradient checkpointing as the run says.

    LoRA's weights are fp32 whatever the model's dtype, and their first values depend on the seed and the weights alone.
    Retrieval takes its embeddings before the head, which would get no gradient: an untied head stays frozen.
    """
    freeze(model, config.model.train)
    for module in whole_modules(model, config.lora).values():
        module.requires_grad_(True)
    if config.traits.embeds and (base := base_model(model)).lm_head.weight is not base.get_input_embeddings().weight:
        base.lm_head.requires_grad_(False)
    if config.lora is not None:
        from peft import get_peft_model

        from smolray.model.loftq import loftq

        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = get_peft_model(model, lora_config(model, config.lora))
        if config.lora.init_lora_weights == "loftq":
            loftq(model, config.model)
        for name, parameter in base_model(model).named_parameters():
            if name.replace(".base_layer", "") in trained:
                parameter.requires_grad_(True)
    checkpoint_layers(base_model(model).model, config.model.gradient_checkpointing)
    model.train()
    return model


def whole_modules(model: nn.Module, lora: LoraConfig | None) -> dict[str, nn.Module]:
    """The modules that lora.modules_to_save names, by their full names.

    Raises:
        ConfigError: a head that is tied to the embeddings is to be trained without them.
    """
    names = lora.modules_to_save if lora else ()
    tied = base_model(model).config.tie_word_embeddings
    if tied and "lm_head" in names and "embed_tokens" not in names:
        raise ConfigError(
            "lora.modules_to_save names lm_head, whose weights are also the token embedding here; "
            "nearest: lora.modules_to_save=[embed_tokens]"
        )
    modules = dict(base_model(model).named_modules())
    return {name: module for name, module in modules.items() if name.rpartition(".")[2] in names}


def merge(model: nn.Module) -> Any:
    """The transformers model with its adapters added to its weights.

    Raises:
        ConfigError: the weights are quantised, and would be rounded again.
    """
    base = base_model(model)
    if getattr(base, "is_quantized", False):
        raise ConfigError("adapters are not merged into 4- or 8-bit weights: load the model without model.load_in_*bit")
    if model is base:
        return base

    from peft.tuners.lora import LoraLayer

    chance = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            weight: Any = layer.get_base_layer().weight
            dtype, weight.data = weight.dtype, weight.data.float()
            layer.merge(safe_merge=True)
            weight.data = stochastic_round(weight.data, dtype, chance)
    return model.unload()  # type: ignore[operator]  # a PeftModel


def stochastic_round(values: torch.Tensor, dtype: torch.dtype, chance: torch.Generator) -> torch.Tensor:
    """float32 `values` in `dtype`; in bfloat16 rounded up or down at random, so that the mean is kept.

    The weights are bf16 values already. Rounding to the nearest would drop every update below half a step (2^-9 of the
    weight), in all weights alike.
    """
    if dtype != torch.bfloat16:
        return values.to(dtype)
    bits = values.cpu().view(torch.int32)
    bits = bits + torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, generator=chance)
    return (bits & -(1 << 16)).view(torch.float32).to(values.device, dtype)


def checkpoint_layers(inner: nn.Module, layers: bool | int) -> None:
    """Recompute activations in the backward pass, in the first `layers` layers (True: all) of tower and text model.

    Where only some positions are needed, forward.py calls the parts of the last text layer: that one then keeps its
    activations.
    """
    for tower in (inner.vision_model.encoder.layers, inner.text_model.layers):  # type: ignore[union-attr]
        for layer in tower[: None if layers is True else int(layers)]:  # type: ignore[index, union-attr]
            layer.gradient_checkpointing, layer._gradient_checkpointing_func = (
                True,
                partial(checkpoint, use_reentrant=False),
            )


def lora_config(model: nn.Module, lora: LoraConfig) -> "PeftLoraConfig":
    """PEFT's config, with targets as full module names.

    A model group with its own rank keeps the scale of the others, lora_alpha / r (rsLoRA: lora_alpha / sqrt(its rank)).

    Raises:
        ConfigError: no linear layer of a group matches, or the head to adapt is tied to the embeddings.
    """
    from peft import LoraConfig as PeftLoraConfig

    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and lora.adapts(name)]
    targets = [name for name in linear if group_of(name) in lora.groups]
    for group in lora.groups:
        if not any(group_of(name) == group for name in targets):
            raise ConfigError(
                f"lora.groups names {group!r}, but lora.target_modules = {lora.target_modules} matches none of "
                "its linear layers"
            )
    if "lm_head" in targets and model.config.tie_word_embeddings:  # type: ignore[union-attr]
        raise ConfigError(
            "lora.target_modules names lm_head, whose weights are also the token embedding here: merged, the adapter "
            "would change both"
        )
    initial: Any = {"default": True, "loftq": True}.get(lora.init_lora_weights, lora.init_lora_weights)
    ranks = {MODULES_OF[group]: rank for group, rank in lora.ranks.items()}
    alphas = {} if lora.use_rslora else {modules: lora.lora_alpha * rank / lora.r for modules, rank in ranks.items()}
    return PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,  # type: ignore[arg-type]  # PEFT takes a float too
        rank_pattern=ranks,
        alpha_pattern=alphas,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        lora_dropout=lora.lora_dropout,
        target_modules=targets,
        init_lora_weights=initial,
        task_type="CAUSAL_LM",
    )


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name, tied ones once, in a stable order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
