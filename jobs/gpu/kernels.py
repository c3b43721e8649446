"""Attention and other kernels: FlexAttention against SDPA, and what the switches cost."""

from functools import partial
from itertools import product

import torch
from torch.nn import functional as F

from jobs.gpu.check import Check, Figures, Needs, expect
from jobs.gpu.timing import timed
from smolray.model.attention import FLEX_CAPABILITY, Layout, flex, group_by_group

HEADS = {"4/2": (4, 2, 24), "9/3": (9, 3, 64), "15/5": (15, 5, 64), "32/32": (32, 32, 64)}
LENGTHS = (1, 80, 127, 128, 129, 2000)


def layout_of(length: int, device: torch.device) -> Layout:
    """Two groups, the second with a prefix and two branches."""
    first = length // 3
    rest = length - first
    branch = torch.zeros(length, dtype=torch.int64)
    branch[first + rest // 2 :] = 1
    branch[first + rest // 2 + rest // 4 :] = 2
    lengths = [first, rest] if first else [rest]
    return Layout(branch.to(device), torch.tensor(lengths, device=device))


def inputs(heads: str, length: int, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Query, key and value of one sequence."""
    count, kv, size = HEADS[heads]
    rng = torch.Generator().manual_seed(length)
    made = (torch.randn(1, n, length, size, generator=rng) for n in (count, kv, kv))
    return [each.to(device, dtype).requires_grad_() for each in made]


def flex_against_sdpa(heads: str, device: torch.device) -> Figures:
    """The largest error of outputs and gradients over all lengths, relative to the largest value."""
    figures: Figures = {}
    for dtype, limit in ((torch.float32, 1e-4), (torch.float16, 1e-2)):
        worst = 0.0
        for length in LENGTHS:
            layout, found = layout_of(length, device), []
            for compiled in (True, False):
                query, key, value = tensors = inputs(heads, length, device, dtype)
                if compiled:
                    out = flex(query, key, value, layout, 0.125)
                else:
                    out = group_by_group(query, key, value, layout, 0.0, 0.125)
                out.float().square().sum().backward()
                found.append([out, *(t.grad for t in tensors)])
            for one, other in zip(*found, strict=True):
                worst = max(worst, float((one - other).abs().max() / other.abs().max().clamp(min=1e-6)))
        name = str(dtype).removeprefix("torch.")
        figures[f"error_{name}"] = worst
        expect(worst < limit, f"FlexAttention differs from SDPA by {worst:.1e} in {name}", figures)
    return figures


def flex_speed(device: torch.device) -> Figures:
    """Milliseconds of a forward and backward pass over 4,000 tokens, heads that share keys or repeated keys."""
    layout, figures = layout_of(4000, device), {}
    for heads, repeated in product(("9/3", "15/5"), (False, True)):
        query, key, value = inputs(heads, 4000, device, torch.float16)
        times = query.shape[1] // key.shape[1] if repeated else 1

        def work(query=query, key=key, value=value, times=times) -> None:
            keys, values = (t.repeat_interleave(times, dim=1) for t in (key, value))
            flex(query, keys, values, layout, 0.125).sum().backward()

        figures[f"{heads}_{'repeated' if repeated else 'shared'}_ms"] = round(timed(work, device) * 1000, 3)
    return figures


def image_tokens(device: torch.device) -> Figures:
    """Milliseconds to put image features into their places, forward and backward: index_copy against masked_scatter."""
    embeds = torch.randn(4096, 576, device=device, requires_grad=True)
    features = torch.randn(2048, 576, device=device, requires_grad=True)
    places = torch.arange(0, 4096, 2, device=device)
    mask = torch.zeros(4096, 1, dtype=torch.bool, device=device)
    mask[places] = True
    ways = {
        "index_copy_ms": lambda: embeds.index_copy(0, places, features).sum().backward(),
        "masked_scatter_ms": lambda: embeds.masked_scatter(mask, features).sum().backward(),
    }
    same = torch.equal(embeds.index_copy(0, places, features), embeds.masked_scatter(mask, features))
    figures = {name: round(timed(work, device) * 1000, 3) for name, work in ways.items()}
    return expect(same, "index_copy and masked_scatter differ", figures)


def cudnn(device: torch.device) -> Figures:
    """Milliseconds of SDPA with cuDNN's kernel allowed and not: one shape again and again, and 32 new shapes."""
    before, figures = torch.backends.cuda.cudnn_sdp_enabled(), {}
    for allowed in (False, True):
        torch.backends.cuda.enable_cudnn_sdp(allowed)
        for name, lengths in {"one_shape": [1500] * 32, "new_shapes": list(range(1500, 1532))}.items():
            query = torch.randn(8, 9, 1, 64, device=device, dtype=torch.float16)
            keys = [torch.randn(8, 9, n, 64, device=device, dtype=torch.float16) for n in lengths]

            def work(query=query, keys=keys) -> None:
                for key in keys:
                    F.scaled_dot_product_attention(query, key, key)

            seconds = timed(work, device, repetitions=1 if name == "new_shapes" else 5)
            figures[f"{'cudnn' if allowed else 'others'}_{name}_ms"] = round(seconds * 1000, 3)
    torch.backends.cuda.enable_cudnn_sdp(before)
    return figures


CHECKS = (
    *(
        Check(
            f"flex {heads}",
            f"Is FlexAttention with heads {heads} SDPA group by group, at every length?",
            partial(flex_against_sdpa, heads),
            Needs(capability=FLEX_CAPABILITY),
        )
        for heads in HEADS
    ),
    Check("flex speed", "What do shared keys save?", flex_speed, Needs(capability=FLEX_CAPABILITY)),
    Check("image tokens", "What does index_copy save over masked_scatter?", image_tokens),
    Check("cudnn", "Does cuDNN's attention pay, for one shape and for new ones?", cudnn),
)
