"""What is minimised: (model, Batch) -> (loss_sum, metrics). Pure; the division by the step's tokens is the loop's.

The language-model head is applied only at positions that predict a trained token (TRL's completion-only loss, summed).
"""

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn import functional as F

from smolray.data.collate import Batch
from smolray.model.adapters import base_model

Metrics = Mapping[str, torch.Tensor]
Objective = Callable[[nn.Module, Batch], tuple[torch.Tensor, Metrics]]


def sft(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, Metrics]:
    """Sum of the cross entropies of the trained tokens: () float32."""
    hidden = hidden_states(model, batch).flatten(0, 1)[batch.target_positions]
    logits = base_model(model).lm_head(hidden).float()
    loss_sum = F.cross_entropy(logits, batch.target_ids, reduction="sum")
    with torch.no_grad():
        correct = (logits.argmax(-1) == batch.target_ids).sum()
    return loss_sum, {"correct_tokens": correct}


OBJECTIVES: dict[str, Objective] = {"sft": sft}


def hidden_states(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Last hidden states of the text model: (B, L, hidden)."""
    return base_model(model).model.text_model(
        inputs_embeds=embed(model, batch), position_ids=batch.position_ids, attention_mask=attention_mask(batch), use_cache=False
    ).last_hidden_state


def embed(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Token embeddings with the image features in the places of the image tokens: (B, L, hidden).

    Every worker must run the same modules in the same order, or ZeRO's collectives meet the wrong partner and hang: a batch of pure text
    adds 0 x a dummy tile where the vision tower is trained or sharded, and the tiles always come before the tokens.
    """
    inner = base_model(model).model
    features = image_features(model, batch)
    nothing = 0.0 * _dummy_features(model, batch).sum() if features is None and _needs_vision(model) else None
    embeds = inner.get_input_embeddings()(batch.input_ids)
    if features is not None:
        return embeds.masked_scatter((batch.input_ids == inner.image_token_id)[..., None], features.to(embeds.dtype))
    return embeds if nothing is None else embeds + nothing.to(embeds.dtype)


def image_features(model: nn.Module, batch: Batch) -> torch.Tensor | None:
    """Features that fill the image tokens of the batch in order, each distinct tile computed once: (image tokens, hidden), None without images."""
    if not len(batch.pixel_values):
        return None
    features = tile_features(model, batch.pixel_values)
    if len(batch.tile_order) != len(features) or not torch.equal(batch.tile_order, torch.arange(len(features), device=features.device)):
        features = features[batch.tile_order]
    return features.flatten(0, 1)


def tile_features(model: nn.Module, tiles: torch.Tensor) -> torch.Tensor:
    """Tiles (T, 3, side, side) uint8 -> connector output (T, tokens of a tile, hidden); SmolVLM's mean and deviation are 0.5."""
    inner = base_model(model).model
    trains_vision = any(p.requires_grad for p in inner.vision_model.parameters())
    with torch.set_grad_enabled(torch.is_grad_enabled() and trains_vision):
        pixels = (tiles.float() / 255 - 0.5) / 0.5
        states = inner.vision_model(pixel_values=pixels.to(inner.vision_model.embeddings.patch_embedding.weight.dtype)).last_hidden_state
    return inner.connector(states)


def attention_mask(batch: Batch) -> torch.Tensor | None:
    """(B, 1, L, L) bool, True = may look; None (plain causal, padding on the right is never looked at) where nothing is packed."""
    branch = batch.branch
    if int(branch.max()) <= 0:
        return None
    return branch_mask(branch, branch, causal_offset=0)


def branch_mask(query: torch.Tensor, key: torch.Tensor, causal_offset: int) -> torch.Tensor:
    """(B, 1, Q, K) bool: a query sees the prefix (branch 0) and its own branch, up to itself. `causal_offset`: index of the first query among the keys."""
    sees = (key[:, None, :] == 0) | (key[:, None, :] == query[:, :, None])
    ones = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool, device=query.device)
    return (sees & ones.tril(diagonal=causal_offset))[:, None]


def _needs_vision(model: nn.Module) -> bool:
    inner = base_model(model).model
    parameters = [*inner.vision_model.parameters(), *inner.connector.parameters()]
    return any(p.requires_grad for p in parameters) or any(hasattr(p, "ds_id") for p in parameters)


def _dummy_features(model: nn.Module, batch: Batch) -> torch.Tensor:
    side = base_model(model).config.vision_config.image_size
    return tile_features(model, torch.full((1, 3, side, side), 127, dtype=torch.uint8, device=batch.input_ids.device))

