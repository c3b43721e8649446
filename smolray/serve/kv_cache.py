"""The keys and values of all tokens that a running batch attends to, in pages (pages.py).

In: the keys and values of new tokens, layer by layer. Out: those of everything that each row of the batch attends to.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from smolray.serve.pages import PAGE, SCRATCH


@dataclass(frozen=True)
class KVShape:
    """The keys and values of one token."""

    layers: int
    heads: int
    width: int
    dtype: torch.dtype

    @classmethod
    def of(cls, text: Any) -> "KVShape":
        """Of a text model."""
        config = text.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(len(text.layers), config.num_key_value_heads, width, text.embed_tokens.weight.dtype)

    @property
    def page_bytes(self) -> int:
        return 2 * self.layers * PAGE * self.heads * self.width * self.dtype.itemsize


class PagedKV:
    """The memory of `pages` pages and the one for padding."""

    def __init__(self, shape: KVShape, pages: int, device: torch.device):
        size = (shape.layers, pages + 1, PAGE, shape.heads, shape.width)
        self.keys = torch.zeros(size, dtype=shape.dtype, device=device)
        self.values = torch.zeros(size, dtype=shape.dtype, device=device)


class Rows:
    """The rows of one forward pass, as the layers' cache: transformers' `past_key_values`.

    Each row has tokens in the cache (`past`) and `new` ones, which are written behind them.
    """

    def __init__(self, memory: PagedKV, tables: Sequence[Sequence[int]], past: Sequence[int], new: Sequence[int]):
        self.memory, device = memory, memory.keys.device
        longest, ends = max(new), [p + n for p, n in zip(past, new, strict=True)]
        pages = -(-max(ends) // PAGE)
        table = torch.full((len(tables), pages), SCRATCH)
        for row, numbers in enumerate(tables):
            used = numbers[:pages]
            table[row, : len(used)] = torch.tensor(used)

        # (rows, longest): the place of each new token among those of its row
        self.position_ids = torch.tensor(past)[:, None] + torch.arange(longest)
        inside = torch.arange(longest) < torch.tensor(new)[:, None]
        page = table.gather(1, (self.position_ids // PAGE).clamp(max=pages - 1))
        slots = torch.where(inside, page * PAGE + self.position_ids % PAGE, SCRATCH)

        self.is_start = not any(past)
        self.mask: torch.Tensor | None = None  # where all is new, padding is on the right and no token sees it
        if not self.is_start:
            seen = torch.arange(pages * PAGE) <= self.position_ids[..., None]
            self.mask = seen[:, None].to(device)
        self.table, self.slots = table.to(device), slots.flatten().to(device)
        self.position_ids = self.position_ids.to(device)

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new tokens' (rows, heads, new, width); return all that the rows attend to."""
        return self._update(self.memory.keys[layer], key), self._update(self.memory.values[layer], value)

    def _update(self, memory: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        rows, heads, _, width = new.shape
        memory.view(-1, heads, width)[self.slots] = new.transpose(1, 2).reshape(-1, heads, width)
        if self.is_start:
            return new
        return memory[self.table].view(rows, -1, heads, width).transpose(1, 2)
