"""The model's forward pass over a Batch, up to the last hidden states: tiles -> features -> embeddings -> text layers.

Pure functions of (model, Batch). Every worker must run the same modules in the same order: ZeRO's collectives have no
names by which they could find their partners.
"""

from typing import Any

import torch
from torch import nn

from smolray.data.batch import Batch
from smolray.model.attention import Layout
from smolray.model.load import base_model

# in one pass through the vision tower without gradients, so that a large batch takes no more memory than a small one
TILES_AT_ONCE = 32


def hidden_states(model: nn.Module, batch: Batch, positions: torch.Tensor | None = None) -> torch.Tensor:
    """Last hidden states of the text model: (B, L, hidden).

    With `positions` (N,), indices into the flattened B x L: (N, hidden).
    """
    return through_layers(base_model(model).model.text_model, embed(model, batch), batch, positions)


def target_states(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Last hidden states that predict the trained tokens: (N, hidden)."""
    return hidden_states(model, batch, batch.target_positions)


def through_layers(
    text: nn.Module, hidden: torch.Tensor, batch: Batch, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """(B, L, hidden) through the layers of a text model, or of a part of one, and its last norm; see `hidden_states`.

    With `positions` the last layer's MLP runs only there: no later layer reads another position.
    """
    return run_layers(text, hidden, batch.position_ids, positions, **attention(batch))


def run_layers(
    text: nn.Module, hidden: torch.Tensor, position_ids: torch.Tensor, positions: torch.Tensor | None, **inputs: Any
) -> torch.Tensor:
    """As `through_layers`, with `inputs` for every layer: how it attends, and the cache of keys and values, if any."""
    inputs["position_embeddings"] = text.rotary_emb(hidden, position_ids=position_ids)  # type: ignore[operator]
    layers: list[Any] = list(text.layers)  # type: ignore[arg-type]
    last = layers.pop() if layers and positions is not None else None
    for layer in layers:
        hidden = layer(hidden, **inputs)

    if last is not None:
        hidden = hidden + last.self_attn(hidden_states=last.input_layernorm(hidden), **inputs)[0]
    if positions is not None:
        hidden = hidden.flatten(0, 1)[positions]
    if last is not None:
        hidden = hidden + last.mlp(last.post_attention_layernorm(hidden))
    return text.norm(hidden)  # type: ignore[operator, no-any-return]


def attention(batch: Batch) -> dict[str, object]:
    """The arguments of the text layers' attention.

    A layout of groups that are concatenated, a mask of packed rows, or neither: then it is causal, and no token sees
    the padding on its right.
    """
    if len(batch.lengths):
        return {"attention_mask": None, "layout": Layout.of(batch.branch, batch.lengths)}
    if not batch.meta["branched"]:
        return {"attention_mask": None}
    return {"attention_mask": branch_mask(batch.branch, batch.branch, causal_offset=0)}


def embed(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Token embeddings with the image features in the places of the image tokens: (B, L, hidden).

    Where the vision tower is trained or sharded, a batch without images adds 0 x the features of a dummy tile, so that
    every worker runs the tower. The tiles always run before the tokens.
    """
    inner = base_model(model).model
    features = image_features(model, batch)
    zero = 0.0 * _dummy_features(model, batch).sum() if features is None and _needs_vision(model) else None
    embeds = noisy(inner.get_input_embeddings()(batch.input_ids), batch)
    if features is not None:
        return with_features(embeds, features, batch)
    return embeds if zero is None else embeds + zero.to(embeds.dtype)


def noisy(embeds: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Token embeddings (B, L, hidden) with the noise of NEFTune (arXiv:2310.05914), where the batch says its seed.

    It is uniform up to alpha / sqrt(tokens of the sequence x hidden). A sequence is a row, or one of the groups that
    lie end to end. The generator is the noise's own, so that dropout stays as it is.
    """
    if "noise" not in batch.meta:
        return embeds
    alpha, seed = batch.meta["noise"]
    if len(batch.lengths):
        tokens = batch.lengths.repeat_interleave(batch.lengths)[None, :, None]
    else:
        tokens = (batch.branch >= 0).sum(dim=1)[:, None, None]

    generator = torch.Generator(embeds.device).manual_seed(seed)
    noise = torch.empty(embeds.shape, device=embeds.device).uniform_(-1, 1, generator=generator)
    return embeds + (noise * alpha / (tokens * embeds.shape[-1]).sqrt()).to(embeds.dtype)


def with_features(embeds: torch.Tensor, features: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Token embeddings (B, L, hidden) with the features (image tokens, hidden) in the places of the image tokens.

    The places come with the batch: to find them on a GPU the host would have to wait, here and in the backward pass.
    """
    flat = embeds.flatten(0, 1).index_copy(0, batch.image_positions, features.to(embeds.dtype))
    return flat.view_as(embeds)


def image_features(model: nn.Module, batch: Batch) -> torch.Tensor | None:
    """The features of the image tokens in order: (image tokens, hidden); None without images.

    Each distinct tile is computed once.
    """
    if len(batch.features):
        features = _connected(model, batch.features)
    elif len(batch.pixel_values):
        features = tile_features(model, batch.pixel_values)
    else:
        return None
    if not batch.meta.get("tiles_in_order"):
        features = features[batch.tile_order]
    return features.flatten(0, 1)


def tile_features(model: nn.Module, tiles: torch.Tensor) -> torch.Tensor:
    """Tiles (T, 3, side, side) uint8 -> connector output (T, tokens of a tile, hidden)."""
    return base_model(model).model.connector(tower_features(model, tiles))


def tower_features(model: nn.Module, tiles: torch.Tensor) -> torch.Tensor:
    """Tiles (T, 3, side, side) uint8 -> vision tower output (T, patches, vision hidden)."""
    tower = base_model(model).model.vision_model
    trains = any(p.requires_grad for p in tower.parameters())
    # under ZeRO-3 every pass is collective, and all workers must make the same number
    sharded = any(hasattr(p, "ds_id") for p in tower.parameters())
    with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
        parts = (tiles,) if sharded or torch.is_grad_enabled() else tiles.split(TILES_AT_ONCE)
        encoded = (
            tower.encoder(inputs_embeds=patch_embeddings(tower, part), attention_mask=None).last_hidden_state
            for part in parts
        )
        return torch.cat([tower.post_layernorm(each) for each in encoded])


def patch_embeddings(tower: nn.Module, tiles: torch.Tensor) -> torch.Tensor:
    """Tiles (T, 3, side, side) uint8 -> input of the tower's first layer (T, patches, vision hidden).

    Pixels are normalised with SmolVLM's mean and deviation, 0.5. transformers' own tower would copy a mask to the GPU
    for every batch and wait until it knows that nothing is masked.
    """
    embeddings: Any = tower.embeddings
    pixels = ((tiles.float() / 255 - 0.5) / 0.5).to(embeddings.patch_embedding.weight.dtype)
    rows, columns = (length // embeddings.patch_size for length in tiles.shape[-2:])
    whole = torch.ones(len(tiles), rows, columns, dtype=torch.bool, device=tiles.device)
    return embeddings(pixel_values=pixels, patch_attention_mask=whole)  # type: ignore[no-any-return]


def branch_mask(query: torch.Tensor, key: torch.Tensor, causal_offset: int) -> torch.Tensor:
    """(B, 1, Q, K) bool: a query sees the prefix (branch 0) and its own branch, up to itself.

    `causal_offset`: index of the first query among the keys.
    """
    sees = (key[:, None, :] == 0) | (key[:, None, :] == query[:, :, None])
    ones = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool, device=query.device)
    return (sees & ones.tril(diagonal=causal_offset))[:, None]


def _connected(model: nn.Module, features: torch.Tensor) -> torch.Tensor:
    """Precomputed features (T, tokens, hidden) through the connector.

    Features of the connector itself are returned as they are: then the model has been loaded without one.

    Raises:
        ValueError: the features are not those of the parts that the model was loaded without.
    """
    inner, config = base_model(model).model, base_model(model).config
    vision = config.vision_config
    patches, width = (vision.image_size // vision.patch_size) ** 2, vision.hidden_size
    ready = _is_empty(inner.connector)
    expected = (patches // config.scale_factor**2, config.text_config.hidden_size) if ready else (patches, width)
    if not _is_empty(inner.vision_model) or tuple(features.shape[1:]) != expected:
        raise ValueError(
            f"features of {tuple(features.shape[1:])} for each tile; expected {expected} and a model without the parts "
            "that compute them: model.parts.drop_submodules"
        )
    return features if ready else inner.connector(features)


def _is_empty(module: nn.Module) -> bool:
    return next(module.parameters(), None) is None


def _needs_vision(model: nn.Module) -> bool:
    inner = base_model(model).model
    parameters = [*inner.vision_model.parameters(), *inner.connector.parameters()]
    return any(p.requires_grad for p in parameters) or any(hasattr(p, "ds_id") for p in parameters)


def _dummy_features(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Features of one grey tile, computed by the same parts of the model as those of any other batch."""
    inner, config = base_model(model).model, base_model(model).config.vision_config
    side, device = config.image_size, batch.input_ids.device
    if _is_empty(inner.vision_model):
        patches, dtype = (side // config.patch_size) ** 2, next(inner.connector.parameters()).dtype
        return inner.connector(torch.zeros(1, patches, config.hidden_size, dtype=dtype, device=device))
    return tile_features(model, torch.full((1, 3, side, side), 127, dtype=torch.uint8, device=device))
