"""Which attention a GPU gets, and with which options. The GPUs are pretended: fake CUDA tensors have shapes alone."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn.attention.flex_attention import flex_attention

from smolray.model import attention
from smolray.model.attention import Layout, flex, group_by_group, kernel_options, packed_attention

AMPERE, HOPPER, TURING = (8, 6), (9, 0), (7, 5)


def layout_of(length):
    """Two groups, the second with branches, and seven tokens of padding."""
    first = length // 3
    second = length - first - 7
    counts = {0: first + second // 2, 1: second // 4, 2: second - second // 2 - second // 4, -1: 7}
    branch = torch.cat([torch.full((count,), number) for number, count in counts.items()])
    return Layout(branch, torch.tensor([first, second]))


def heads_of(heads, key_heads, length, size=24):
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(1, count, length, size, generator=rng) for count in (heads, key_heads, key_heads)]


@pytest.mark.parametrize(("capability", "expected"), [(TURING, "groups"), ((8, 0), "flex"), (HOPPER, "flex")])
def test_a_gpu_without_the_tensor_core_instructions_of_flex_attention_gets_sdpa(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(attention, "flex", lambda query, *_: seen.append("flex") or torch.empty(query.shape))
    monkeypatch.setattr(
        attention, "group_by_group", lambda query, *_: seen.append("groups") or torch.empty(query.shape)
    )
    seen = []
    with FakeTensorMode():
        query, key, value = (torch.empty(1, count, 300, 24, device="cuda") for count in (4, 2, 2))
        packed_attention(SimpleNamespace(training=True), query, key, value, None, layout=layout_of(300))
    assert seen == [expected]


def test_sdpa_by_group_copies_the_branches_to_the_host_once(monkeypatch):
    """On a GPU each copy is a wait, and there may be dozens of groups."""
    copies = []
    plain = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append(1) or plain(tensor))
    assert len(layout_of(300).pieces) == 3 and len(copies) == 1


@pytest.mark.parametrize("length", [80, 127, 300])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (9, 3), (4, 4)])
def test_flex_attention_gives_what_sdpa_gives_group_by_group(monkeypatch, heads, key_heads, length):
    """Uncompiled, on a CPU, where it has no backward pass."""
    calls = []

    def uncompiled(*args, **options):
        calls.append(options)
        return flex_attention(*args, **options)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: AMPERE)
    monkeypatch.setattr(attention, "_compiled_flex", lambda: uncompiled)
    query, key, value = heads_of(heads, key_heads, length)
    layout = layout_of(length)
    with torch.no_grad():
        found = flex(query, key, value, layout, 0.2)
    torch.testing.assert_close(found, group_by_group(query, key, value, layout, 0.0, 0.2), rtol=1e-5, atol=1e-6)
    # heads share keys and values, which are not repeated for them; no decoding kernel for short sequences
    assert calls[0]["enable_gqa"] and calls[0]["kernel_options"]["FORCE_USE_FLEX_ATTENTION"]


def test_the_mask_reads_int32_ids():
    ids = [cell.cell_contents for cell in layout_of(300).block_mask.mask_mod.__closure__]
    assert {each.dtype for each in ids} == {torch.int32}


def test_kernel_options_are_those_of_the_card():
    ampere = kernel_options(AMPERE, torch.bfloat16)
    assert (ampere["fwd_num_warps"], ampere["fwd_BLOCK_N"], ampere["fwd_num_stages"]) == (8, 64, 2)
    assert kernel_options((8, 9), torch.float16) == ampere
    assert kernel_options(HOPPER, torch.bfloat16) == {"FORCE_USE_FLEX_ATTENTION": True, "fwd_num_warps": 8}
    # in fp32 these would need more shared memory than a 3090 has
    for plain in (kernel_options(HOPPER, torch.float32), kernel_options(AMPERE, torch.float32)):
        assert plain == {"FORCE_USE_FLEX_ATTENTION": True}
