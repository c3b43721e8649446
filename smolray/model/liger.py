"""Liger's Triton kernels in place of the text model's own RMSNorm, SwiGLU and rotary embedding, and of the head's loss.

In: a model of the SmolVLM family, ready for training. Out: the same model with the same weights, changed in place: its
modules get other classes. It needs the package liger-kernel, and Triton on a GPU. `make cuda-proofs` holds that
outputs and gradients are those of the modules replaced.
"""

from typing import Any

import torch
from liger_kernel.ops import (
    LigerFusedLinearCrossEntropyFunction,
    LigerRMSNormFunction,
    LigerRopeFunction,
    LigerSiLUMulFunction,
)
from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from smolray.config import ConfigError
from smolray.model.load import base_model


class FusedRMSNorm(LlamaRMSNorm):
    """RMSNorm in one kernel each way; it keeps its input in the compute dtype, not in fp32."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # not in place: the gradient that it is given stays as it is
        return LigerRMSNormFunction.apply(hidden_states, self.weight, self.variance_epsilon, 0.0, "llama", False)


class FusedMLP(LlamaMLP):
    """silu(gate) x up in one kernel each way; the activation is computed again in the backward pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x), 1.0, 1.0))


class FusedHead(nn.Linear):
    """A head whose loss is computed for a part of the positions at a time: all logits never exist together."""

    def summed_loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of the cross entropy over (N, hidden), and the number of positions whose target is most likely.

        Its gradients are computed here, in the forward pass.
        """
        loss, _, share, _ = self._fused(hidden, targets, "sum")
        return loss, share.detach() * len(targets)

    def losses(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The cross entropy of each position: (N, hidden) -> (N,) float32. Logits are computed anew for gradients."""
        return self._fused(hidden, targets, "none")[0]

    def fuses(self, hidden: torch.Tensor) -> bool:
        """Whether the kernel gives the gradients of this call: it takes the weights' from those of its input."""
        return len(hidden) > 0 and (hidden.requires_grad or not (torch.is_grad_enabled() and self.weight.requires_grad))

    def _fused(self, hidden: torch.Tensor, targets: torch.Tensor, reduction: str) -> Any:
        """(loss, None, share of the positions, or of each position 0 or 1, whose target is most likely, None)."""
        options = (None, None, -100, 0.0, 0.0, reduction, None, False)
        # the gradient of the weights is added in fp32; the share of hits is wanted
        return LigerFusedLinearCrossEntropyFunction.apply(
            hidden, self.weight, targets, *options, torch.float32, False, True
        )


def use_liger(model: nn.Module, layers: bool) -> None:
    """Replace the head's loss, and with `layers` RMSNorm, SwiGLU and the rotary embedding of the text model.

    The rotary embedding is a function of transformers', replaced for the rest of the process. A head with an adapter
    stays as it is.

    Raises:
        ConfigError: the text model has another activation.
    """
    base = base_model(model)
    if type(base.lm_head) is nn.Linear and base.lm_head.bias is None:
        base.lm_head.__class__ = FusedHead
    if not layers:
        return

    activation = base.config.text_config.hidden_act
    if activation != "silu":
        raise ConfigError(
            f"model.use_liger_kernel = true: the text model's activation is {activation}, expected silu; "
            "nearest: model.use_liger_kernel=false"
        )
    classes: dict[type, type] = {LlamaRMSNorm: FusedRMSNorm, LlamaMLP: FusedMLP}
    for module in base.modules():
        module.__class__ = classes.get(type(module), type(module))
    modeling_llama.apply_rotary_pos_emb = rotary


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries (B, heads, L, d) and keys (B, key heads, L, d), rotated as by transformers, in one kernel."""
    return LigerRopeFunction.apply(q, k, cos, sin, None, unsqueeze_dim)
