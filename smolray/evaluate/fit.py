"""Batches of prompts as large as the memory holds.

In: a model and a device, or a Batch of prompts that may be too large. Out: the most tokens to decode together, and the
answers of a batch, in parts where the whole does not fit.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from smolray.config import ConfigError
from smolray.data.batch import Batch
from smolray.model.load import base_model
from smolray.planner.assumptions import DECODING_SHARE
from smolray.planner.decoding import token_bytes
from smolray.planner.shapes import ModelShape


def most_tokens(model: nn.Module, device: torch.device) -> int | None:
    """The most prompt tokens, padding included, that fit into the free memory of a GPU while they are decoded.

    None on a CPU. Collective: the least of all workers, who plan the same batches.
    """
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    fits: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(fits, max(int(DECODING_SHARE * free / bytes_of_token(model)), 1))
    return min(fits)


def bytes_of_token(model: nn.Module) -> int:
    """What a prompt token takes while it is decoded."""
    base = base_model(model)
    shape = ModelShape.from_config(base.config.to_dict(), base.config.name_or_path)
    return token_bytes(shape.text, base.get_input_embeddings().weight.element_size())


@dataclass
class PartsThatFit:
    """Runs batches of prompts, and halves what does not fit into memory until it does.

    `rows`: the most sequences that are run together; smaller once more have not fitted.
    """

    work: Callable[[Batch], list[Any]]
    rows: int | None = field(default=None, init=False)

    def __call__(self, batch: Batch) -> list[Any]:
        """What `work` returns for each conversation, in order. Raises ConfigError where one sequence is too large."""
        sequences = len(batch.input_ids)
        most = min(self.rows or sequences, sequences)
        if most == sequences:
            found = self._attempt(batch)
            if found is not None:
                return found
            gc.collect()  # the frames of the failed attempt hold its tensors
            if batch.input_ids.is_cuda:
                torch.cuda.empty_cache()
            most = self.rows = -(-sequences // 2)
        return [each for part in parts_of(batch, most) for each in self(part)]

    def _attempt(self, batch: Batch) -> list[Any] | None:
        """The result, or None where the memory is too small."""
        try:
            return self.work(batch)
        except torch.OutOfMemoryError as error:
            if len(batch.input_ids) > 1:
                return None
            raise ConfigError(
                f"the {len(batch.ends)} questions of one sequence, {batch.input_ids.shape[1]} tokens, do not fit into "
                f"memory for decoding ({str(error).splitlines()[0]}); nearest: a smaller evaluate.batch_size, "
                "data.max_questions_per_image or image.max_tiles"
            ) from None


def parts_of(batch: Batch, rows: int) -> Iterator[Batch]:
    """A batch of prompts in parts of at most `rows` sequences, each with its own tiles."""
    for start in range(0, len(batch.input_ids), rows):
        yield _part(batch, start, min(start + rows, len(batch.input_ids)))


def _part(batch: Batch, start: int, stop: int) -> Batch:
    length = batch.input_ids.shape[1]
    first, last = start * length, stop * length

    def inside(positions: torch.Tensor) -> torch.Tensor:
        return (positions >= first) & (positions < last)

    ends, images = inside(batch.ends), inside(batch.image_positions)
    each = len(batch.image_positions) // max(len(batch.tile_order), 1)  # tokens of a tile
    placed = batch.tile_order[images[::each]] if each else batch.tile_order
    tiles, order = placed.unique(return_inverse=True)
    own = ends.tolist()
    meta = {
        name: [each for each, mine in zip(value, own, strict=True) if mine] if name in ("ids", "records") else value
        for name, value in batch.meta.items()
    }
    return replace(
        batch,
        input_ids=batch.input_ids[start:stop],
        position_ids=batch.position_ids[start:stop],
        branch=batch.branch[start:stop],
        pixel_values=batch.pixel_values[tiles] if len(batch.pixel_values) else batch.pixel_values,
        features=batch.features[tiles] if len(batch.features) else batch.features,
        tile_order=order,
        ends=batch.ends[ends] - first,
        image_positions=batch.image_positions[images] - first,
        meta=meta | {"tiles_in_order": False},
    )
