"""One stage as a module: it takes what the stage before sent and gives what the next one needs.

The last stage gives the micro-batch's contribution to the loss.

Only hidden states travel, in one shape for all micro-batches of a step: tiles (T, patches, vision hidden) up to merge,
then tokens (N, hidden), padded at the end. Inside a stage each micro-batch is computed in its own shape. Everything
else (token ids, positions, layouts, labels) comes from the stage's own copy of the batches. transformers' modules do
the work; each stage makes its own masks and rotary angles.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

from smolray.data.batch import Batch
from smolray.engine.base import micro_batch_seed
from smolray.engine.pipeline.split import EMBEDDINGS, HEAD, MERGE
from smolray.model.forward import noisy, patch_embeddings, through_layers, with_features
from smolray.model.load import base_model
from smolray.objectives.base import Contributions, Normalisers, Objective, completion_logps

TOKENS_ROUNDED_TO, TILES_ROUNDED_TO = 64, 2  # so that neighbouring steps share a bucket


@dataclass(frozen=True)
class Bucket:
    """The sizes in which all micro-batches of a step travel."""

    tiles: int
    tokens: int
    micro_batches: int

    @classmethod
    def of(cls, batches: Sequence[Batch], micro_batches: int) -> "Bucket":
        """The smallest bucket that holds these batches; `micro_batches`: as many as the schedule runs."""
        tiles = max(len(batch.pixel_values) for batch in batches)
        tokens = max(batch.input_ids.numel() for batch in batches)
        return cls(_round_up(max(tiles, 1), TILES_ROUNDED_TO), _round_up(tokens, TOKENS_ROUNDED_TO), micro_batches)


class Stage(nn.Module):
    """The pipeline layers of one stage.

    Args:
        model: of which the weights of these layers are on `device`.
        layers: their names (split.py), in order.
        index: of the stage.
        objective: what the last stage computes.
        seed: of the run; keys the dropout.
        dtype: of the hidden states that travel.
        device: of this worker.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        index: int,
        objective: Objective,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__()
        self.model, self.layers, self.index, self.objective = model, tuple(layers), index, objective
        self.seed, self.dtype, self.device = seed, dtype, device

        inner = base_model(model).model
        starts_in_tower = layers[0].startswith("vision")
        self.vision = _slice(inner.vision_model.encoder, _numbers(layers, "vision")) if starts_in_tower else None
        self.text = _slice(inner.text_model, _numbers(layers, "text"))
        if HEAD not in layers:
            self.text._modules["norm"] = nn.Identity()
        self.receives_tiles = layers[0].startswith("vision.") or layers[0] == MERGE
        self.sends_tiles = layers[-1].startswith("vision")

        self.batches: Sequence[Batch | None] = ()
        self.contributions: list[Contributions] = []  # to the objective's metrics, in the last stage
        self.reference: dict[int, torch.Tensor] = {}  # log-probabilities by micro-batch, in the last stage
        self.scoring = False

    def begin(self, batches: Sequence[Batch | None], normalisers: Normalisers, bucket: Bucket, epoch: int) -> None:
        """Take the micro-batches of a step. None: a micro-batch without data, which only fills the schedule."""
        self.batches, self.normalisers, self.bucket, self.epoch = batches, normalisers, bucket, epoch
        self.contributions, self.reference = [], {}

    def boundary(self, tiles: bool) -> tuple[int, ...]:
        """Shape of what crosses a boundary where tiles travel (`tiles`), or tokens."""
        config = base_model(self.model).config
        vision = config.vision_config
        if tiles:
            return self.bucket.tiles, (vision.image_size // vision.patch_size) ** 2, vision.hidden_size
        return self.bucket.tokens, config.text_config.hidden_size

    def forward(self, received: torch.Tensor | None = None, number: torch.Tensor | None = None) -> torch.Tensor:
        """Run one micro-batch.

        Args:
            received: from the stage before, in the shape of `boundary`; None on the first stage.
            number: (1,) which micro-batch.
        """
        assert number is not None
        batch = self.batches[int(number)]
        if batch is None:
            return torch.zeros((), device=self.device) if HEAD in self.layers else self._sent(None)

        batch = self._needed(batch).to(self.device)
        torch.manual_seed(micro_batch_seed(self.seed, self.epoch, batch.meta["number"]) + self.index)
        hidden = self._received(received, batch)
        if self.layers[0].startswith("vision"):
            hidden = self._vision(hidden, batch)
        if MERGE in self.layers:
            hidden = self._merge(hidden, batch)
        if self.sends_tiles or self.layers[-1] == MERGE:
            return self._sent(hidden)

        assert hidden is not None
        positions = self.objective.positions(batch) if HEAD in self.layers else None
        hidden = through_layers(self.text, hidden, batch, positions)
        return self._sent(hidden) if positions is None else self._loss(hidden, batch, int(number))

    def _needed(self, batch: Batch) -> Batch:
        """The batch without the pixels and features that only other stages read. It keeps its number of tiles."""
        pixels = batch.pixel_values if EMBEDDINGS in self.layers else batch.pixel_values[:, :0]
        features = batch.features if MERGE in self.layers else batch.features[:0]
        return replace(batch, pixel_values=pixels, features=features)

    def _received(self, received: torch.Tensor | None, batch: Batch) -> torch.Tensor | None:
        """`received` without its padding: tiles (T, patches, hidden) or tokens (B, L, hidden); None without tiles."""
        if received is None:
            return None
        if self.receives_tiles:
            return received[: len(batch.pixel_values)] if len(batch.pixel_values) else None
        return received[: batch.input_ids.numel()].unflatten(0, batch.input_ids.shape)

    def _sent(self, hidden: torch.Tensor | None) -> torch.Tensor:
        """`hidden` padded to the shape of `boundary`; zeros for None."""
        shape = self.boundary(self.sends_tiles)
        if hidden is None:
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        rows = hidden if self.sends_tiles else hidden.flatten(0, 1)
        padding = [0, 0] * (rows.ndim - 1) + [0, shape[0] - len(rows)]
        return F.pad(rows.to(self.dtype), padding).contiguous()

    def _vision(self, hidden: torch.Tensor | None, batch: Batch) -> torch.Tensor | None:
        """(T, patches, vision hidden) after this stage's vision layers; None where the micro-batch has no tiles."""
        if not len(batch.pixel_values):
            return None
        if EMBEDDINGS in self.layers:
            hidden = patch_embeddings(base_model(self.model).model.vision_model, batch.pixel_values)
        assert self.vision is not None
        return self.vision(inputs_embeds=hidden, attention_mask=None).last_hidden_state

    def _merge(self, tiles: torch.Tensor | None, batch: Batch) -> torch.Tensor:
        """(B, L, hidden): token embeddings with the image features in the places of the image tokens."""
        inner = base_model(self.model).model
        embeds = noisy(inner.get_input_embeddings()(batch.input_ids), batch)
        if len(batch.features):
            # of the vision tower; or of the connector, where the model has been left without one
            connected = next(inner.connector.parameters(), None) is None
            features = batch.features if connected else inner.connector(batch.features)
        elif tiles is not None:
            features = inner.connector(inner.vision_model.post_layernorm(tiles))
        else:
            return embeds

        return with_features(embeds, features[batch.tile_order].flatten(0, 1), batch)

    def _loss(self, hidden: torch.Tensor, batch: Batch, number: int) -> torch.Tensor:
        """() the micro-batch's contribution to the loss; while scoring 0, and the log-probabilities are kept."""
        head = base_model(self.model).lm_head
        if self.scoring:
            self.reference[number] = completion_logps(head, hidden, batch)
            return hidden.new_zeros(())

        if number in self.reference:
            batch = replace(batch, reference_logps=self.reference[number])
        loss, contributions = self.objective.loss(head, hidden, batch, self.normalisers)
        self.contributions.append(contributions)
        return loss


def _numbers(layers: Sequence[str], tower: str) -> list[int]:
    """Which of the tower's transformer layers are among these pipeline layers."""
    return [int(layer.split(".")[1]) for layer in layers if layer.startswith(f"{tower}.")]


def _slice(module: nn.Module, numbers: list[int]) -> nn.Module:
    """A tower of transformers that runs only these of its layers.

    They are the same modules, and keep their names in the model.
    """
    part = copy.copy(module)
    part._modules = dict(module._modules)
    part._modules["layers"] = nn.ModuleList([module.layers[i] for i in numbers])  # type: ignore[index, misc]
    return part


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step
