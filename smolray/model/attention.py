"""Attention of the text model over groups that are concatenated in one sequence.

Each group sees itself only, and there is no padding between them.

In: queries, keys and values of the whole sequence, and its Layout. Out: what each group would give by itself. On a GPU
of compute capability 8.0 or newer it is FlexAttention with a block mask (compiled; blocks between groups are skipped),
elsewhere SDPA group by group. Without a Layout it is transformers' SDPA.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "smolray"
BLOCK, ROWS = 128, 2048  # size of FlexAttention's blocks; query rows of the mask that are built at once
FLEX_CAPABILITY = (8, 0)  # below it FlexAttention's kernels have no tensor-core instructions
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
        # one copy: the host would wait for the maximum of each group
        causal = [int(branch.max()) <= 0 for branch in self.branch.cpu().split(lengths)]
        found: list[tuple[int, torch.Tensor | None]] = []
        for branch, alone in zip(self.branch.split(lengths), causal, strict=True):
            if alone:
                found.append((len(branch), None))
            else:
                sees = (branch[None, :] == 0) | (branch[None, :] == branch[:, None])
                found.append((len(branch), sees.tril()))
        return found

    @cached_property
    def block_mask(self) -> BlockMask:
        """The mask for FlexAttention, built for ROWS queries at a time.

        A token has the id of its branch in its group, and knows that of the group's prefix. They are int32: the kernels
        read them for every pair of tokens.
        """
        length, device = len(self.branch), self.branch.device
        ends = self.lengths.cumsum(0)
        group = torch.searchsorted(ends, torch.arange(length, device=device), right=True, out_int32=True)
        prefix = group * (length + 2)
        own = prefix + self.branch.int()

        def sees(batch: Any, head: Any, query: Any, key: Any) -> Any:
            return (query >= key) & ((own[key] == own[query]) | (own[key] == prefix[query]))

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


@torch.compiler.disable  # each length would be another graph of the layer; FlexAttention is compiled by itself
def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    layout: Layout | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function that transformers calls.

    Query (B, heads, L, d), key and value (B, key heads, L, d) -> (B, L, heads, d). `cache`: what attends in its place,
    to keys and values that it holds itself (serve.kv_cache.FoldedRows).
    """
    if cache is not None:
        return cache.attend(module.layer_idx, query, scaling), None
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if query.is_cuda and torch.cuda.get_device_capability(query.device) >= FLEX_CAPABILITY:
        out = flex(query, key, value, layout, scaling)
    else:
        out = group_by_group(query, key, value, layout, dropout, scaling)
    return out.transpose(1, 2).contiguous(), None


def flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scaling: float | None
) -> torch.Tensor:
    """FlexAttention: (B, heads, L, d). Keys and values are not repeated for the heads that share them."""
    return _compiled_flex()(
        query,
        key,
        value,
        block_mask=layout.block_mask,
        scale=scaling,
        enable_gqa=True,
        kernel_options=kernel_options(torch.cuda.get_device_capability(query.device), query.dtype),
    )


def kernel_options(capability: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
    """FlexAttention's options for a GPU.

    Below 128 tokens torch would take its decoding kernel, which does not compile for heads of this mask. In 16 bit
    torch's own choice of 4 warps spills registers: where heads share keys on Ampere and Ada, for every head on Hopper.
    """
    options: dict[str, Any] = {"FORCE_USE_FLEX_ATTENTION": True}
    if dtype == torch.float32:
        return options
    if capability[0] == 8:
        options |= {"fwd_num_warps": 8, "fwd_BLOCK_N": 64, "fwd_num_stages": 2}
    elif capability[0] == 9:
        options |= {"fwd_num_warps": 8}
    return options


@cache
def _compiled_flex() -> Callable[..., torch.Tensor]:
    return torch.compile(flex_attention, dynamic=True)


def group_by_group(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """SDPA of each group: (B, heads, L, d)."""
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
    return torch.cat(out, dim=2)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
