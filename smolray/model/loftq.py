"""LoftQ (arXiv:2310.08659): adapters that start as what 4-bit rounding has taken from the weights.

In: a PeftModel over 4-bit weights, or over the 16-bit weights that these were rounded from. Out: its first adapters.
Under 16-bit weights the base becomes what 4 bits have left of it, so that adapters trained over the one merge into the
other. PEFT's own (peft.utils.loftq_utils) needs a GPU.
"""

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.loftq_utils import _low_rank_decomposition
from torch import nn

from smolray.config import ModelConfig
from smolray.model.load import load_model


@torch.no_grad()
def loftq(model: nn.Module, config: ModelConfig) -> None:
    """Set every adapter to the largest singular values of (weight - its 4-bit value). `config`: of the base model."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    weights: dict[str, torch.Tensor] = {}
    if any(type(layer.get_base_layer()).__name__ == "Linear4bit" for layer in layers.values()):
        whole = load_model(config.replace({"load_in_4bit": False}))
        weights = {f"base_model.model.{name}": p for name, p in whole.named_parameters()}

    for name, layer in layers.items():
        base: Any = layer.get_base_layer()
        if "Linear4bit" not in type(base).__name__ and ".text_model." not in name:
            continue  # only the text model is rounded (load_model): the adapters of the rest start at zero
        whole_weight = weights.get(f"{name}.weight", base.weight).float()
        rounded = _rounded(base, whole_weight)

        parts = _low_rank_decomposition(whole_weight.to(rounded.device) - rounded, reduced_rank=layer.r["default"])
        first, second = (getattr(layer, name)["default"].weight.zero_() for name in ("lora_A", "lora_B"))
        rank = len(parts["R"])  # below that of the adapter where the layer is narrower
        first[:rank] = parts["R"]
        second[:, :rank] = parts["L"] / layer.scaling["default"]
        if not weights:
            base.weight.copy_(rounded)


def _rounded(base: nn.Linear, weight: torch.Tensor) -> torch.Tensor:
    """(out, in) float32: what 4 bits leave of a layer's weight."""
    import bitsandbytes.functional as F

    held: Any = base.weight
    if hasattr(held, "quant_state"):
        return F.dequantize_4bit(held.data, held.quant_state).float()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    codes, state = F.quantize_4bit(weight.to(device, held.dtype), compress_statistics=True, quant_type="nf4")
    return F.dequantize_4bit(codes, state).to(weight.device, torch.float32)
