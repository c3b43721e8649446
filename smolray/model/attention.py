"""Attention of the text model over groups that are concatenated in one sequence: each sees itself only, and there is no
padding between them.

In: queries, keys and values of the whole sequence, and its Layout. Out: what each group would give by itself. On a GPU
it is FlexAttention with a block mask (compiled; blocks between groups are skipped), elsewhere SDPA group by group.
Without a Layout it is transformers' SDPA.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "smolray"
BLOCK, ROWS = 128, 2048  # size of FlexAttention's blocks; query rows of the mask that are built at once
# Without these FlexAttention would run uncompiled after eight variants (lengths, gradients on or off), with all scores
# in memory.
torch._dynamo.config.recompile_limit = 64
torch._dynamo.config.fail_on_recompile_limit_hit = True


@dataclass(frozen=True)
class Layout:
    """Which tokens see each other.

    `branch` (L,): 0 prefix of a group, 1.. its branches, -1 padding. `lengths` (groups,): tokens of each group, in
    order.
    """

    branch: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def of(cls, branch: torch.Tensor, lengths: torch.Tensor) -> "Layout":
        """From a Batch's `branch` (1, L) and `lengths`; the tokens behind the groups are padding."""
        return cls(branch[0], lengths)

    @cached_property
    def pieces(self) -> list[tuple[int, torch.Tensor | None]]:
        """(length, mask (length, length) bool) of each group and of the padding; None: causal."""
        lengths = self.lengths.tolist()
        lengths += [rest] if (rest := len(self.branch) - sum(lengths)) else []
        found: list[tuple[int, torch.Tensor | None]] = []
        for branch in self.branch.split(lengths):
            if int(branch.max()) <= 0:
                found.append((len(branch), None))
            else:
                sees = (branch[None, :] == 0) | (branch[None, :] == branch[:, None])
                found.append((len(branch), sees.tril()))
        return found

    @cached_property
    def block_mask(self) -> BlockMask:
        """The mask for FlexAttention, built for ROWS queries at a time."""
        length, device = len(self.branch), self.branch.device
        branch = self.branch
        ends = self.lengths.cumsum(0)
        group = torch.searchsorted(ends, torch.arange(length, device=device), right=True)

        def sees(batch: Any, head: Any, query: Any, key: Any) -> Any:
            same = (branch[key] == 0) | (branch[key] == branch[query])
            return (query >= key) & (group[query] == group[key]) & same

        blocks = -(-length // BLOCK)
        keys = torch.arange(blocks * BLOCK, device=device)
        counts = []
        for queries in keys.split(ROWS):
            inside = (queries < length)[:, None] & (keys < length)
            seen = inside & sees(0, 0, queries.clamp(max=length - 1)[:, None], keys.clamp(max=length - 1))
            counts.append(seen.view(-1, BLOCK, blocks, BLOCK).sum(dim=(1, 3)))
        count = torch.cat(counts)[None, None]
        whole = count == BLOCK**2
        some = (count > 0) & ~whole
        return BlockMask.from_kv_blocks(
            *_listed(some), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(length, length)
        )


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, 1, rows, columns) bool -> int32: how many of each row are set, and all column numbers, the set ones first."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.int()


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' attention interface: query (B, heads, L, d), key and value (B, key heads, L, d) -> (B, L, heads,
    d).
    """
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if query.is_cuda:
        return flex_attention_forward(module, query, key, value, layout.block_mask, scaling=scaling)

    times = query.shape[1] // key.shape[1]
    lengths = [length for length, _ in layout.pieces]
    parts = zip(
        *(t.split(lengths, dim=2) for t in (query, repeat_kv(key, times), repeat_kv(value, times))),
        layout.pieces,
        strict=True,
    )

    out = [
        F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling, is_causal=mask is None
        )
        for q, k, v, (_, mask) in parts
    ]

    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
