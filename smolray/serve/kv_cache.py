"""The keys and values of all tokens that a running batch attends to, in pages (pages.py).

In: the keys and values of new tokens, layer by layer. Out: those of everything that each row of the batch attends to,
or where rows begin alike, what they attend to.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from smolray.serve.pages import PAGE, SCRATCH
from smolray.serve.prefixes import Prefix


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
    """The memory of `pages` pages and the one for padding: (layers, heads, pages, PAGE, width)."""

    def __init__(self, shape: KVShape, pages: int, device: torch.device):
        size = (shape.layers, shape.heads, pages + 1, PAGE, shape.width)
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
        table = _table([numbers[:pages] for numbers in tables])

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
        _, heads, _, width = new.shape
        memory.view(heads, -1, width).index_copy_(1, self.slots, new.transpose(0, 1).reshape(heads, -1, width))
        return new if self.is_start else _read(memory, self.table).transpose(0, 1)


class FoldedRows(Rows):
    """Rows with one new token each, some of which begin alike.

    What rows of a Prefix have in common is read once, for the queries of all of them; then each row reads its own. The
    softmax is over both, in float32.
    """

    def __init__(
        self, memory: PagedKV, tables: Sequence[Sequence[int]], past: Sequence[int], prefixes: Sequence[Prefix]
    ):
        super().__init__(memory, tables, past, [1] * len(tables))
        device = memory.keys.device
        self.mask = None
        self.width = max(len(prefix.rows) for prefix in prefixes)  # rows of a prefix, padded
        self.prefix_table = _table([prefix.pages for prefix in prefixes]).to(device)
        start, place = torch.zeros(2, len(tables), dtype=torch.int64)
        for number, prefix in enumerate(prefixes):
            start[prefix.rows] = len(prefix.pages)
            place[prefix.rows] = number * self.width + torch.arange(len(prefix.rows))

        last = torch.tensor(past) - start * PAGE  # the place of each new token among the row's own
        own = [pages[first : end // PAGE + 1] for pages, first, end in zip(tables, start.tolist(), past, strict=True)]
        own_table = _table(own)
        in_prefix = torch.arange(self.prefix_table.shape[1] * PAGE) < start[:, None] * PAGE
        in_own = torch.arange(own_table.shape[1] * PAGE) <= last[:, None]
        self.unseen = ~torch.cat([in_prefix, in_own], dim=1)[:, None].to(device)
        self.place, self.own_table = place.to(device), own_table.to(device)

    def _update(self, memory: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        _, heads, _, width = new.shape
        memory.view(heads, -1, width).index_copy_(1, self.slots, new[:, :, 0].transpose(0, 1))
        return new  # `attend` reads the memory

    def attend(self, layer: int, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """Query (rows, heads, 1, width) -> (rows, 1, heads, width)."""
        rows, heads, _, width = query.shape
        keys, values = self.memory.keys[layer], self.memory.values[layer]
        # heads of queries that share keys are rows of one product: (key heads, rows, heads of a key, width)
        asks = query.view(rows, len(keys), -1, width).transpose(0, 1).float() * scaling
        common = self._folded(asks) @ _read(keys, self.prefix_table).float().mT
        own = asks @ _read(keys, self.own_table).float().mT
        scores = torch.cat([self._unfolded(common), own], dim=-1).masked_fill(self.unseen, -torch.inf)

        weights = scores.softmax(-1).split([common.shape[-1], own.shape[-1]], dim=-1)
        out = self._unfolded(self._folded(weights[0]) @ _read(values, self.prefix_table).float())
        out = out + weights[1] @ _read(values, self.own_table).float()
        return out.transpose(0, 1).reshape(rows, 1, heads, width).to(query.dtype)

    def _folded(self, rows: torch.Tensor) -> torch.Tensor:
        """(key heads, rows, n, width) -> (key heads, prefixes, rows of a prefix x n, width)."""
        prefixes = len(self.prefix_table)
        folded = rows.new_zeros(len(rows), prefixes * self.width, *rows.shape[2:])
        folded[:, self.place] = rows
        return folded.view(len(rows), prefixes, -1, rows.shape[-1])

    def _unfolded(self, folded: torch.Tensor) -> torch.Tensor:
        """The inverse of `_folded`."""
        heads, prefixes, _, width = folded.shape
        return folded.view(heads, prefixes * self.width, -1, width)[:, self.place]


def _read(memory: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The tokens of a table of pages: (heads, rows of the table, tokens, width)."""
    return memory.index_select(1, table.flatten()).view(len(memory), len(table), -1, memory.shape[-1])


def _table(pages: Sequence[Sequence[int]]) -> torch.Tensor:
    """(rows, longest) int64, padded with SCRATCH."""
    longest = max(map(len, pages))
    return torch.tensor([[*row, *[SCRATCH] * (longest - len(row))] for row in pages], dtype=torch.int64)
