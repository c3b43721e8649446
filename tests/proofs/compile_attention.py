"""Compile the attention of packed groups for a pretended card, and print what was made as JSON.

`python -m tests.proofs.compile_attention rtx3090 bfloat16 9/3/64 1,80,1000`: query heads / key heads / size, lengths.
"""

import argparse
import json
from types import SimpleNamespace

import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from tests.proofs.pretended import Compiled

# Which of query, key and value have gradients, and whether there are any at all.
KINDS = {
    "trained": ((True, True, True), True),
    "adapters": ((True, False, True), True),  # of the first layer's queries and values
    "evaluated": ((True, True, True), False),
    "frozen": ((False, False, False), True),
}


def attend(heads: tuple[int, int, int], dtype: torch.dtype, length: int, kind: str) -> None:
    """Forward, and backward where there are gradients."""
    from smolray.model.attention import Layout, packed_attention

    query_heads, key_heads, size = heads
    gradients, enabled = KINDS[kind]
    branch, groups = (torch.zeros(n, dtype=torch.int64, device="cuda") for n in (length, 3))
    layout = Layout(branch, groups)
    layout.__dict__["pieces"] = [(length, None)]  # their lengths are values, which fake tensors do not have
    query, key, value = (
        torch.empty(1, length, n, size, device="cuda", dtype=dtype, requires_grad=gradient).transpose(1, 2)
        for n, gradient in zip((query_heads, key_heads, key_heads), gradients, strict=True)
    )

    with torch.set_grad_enabled(enabled):
        out, _ = packed_attention(SimpleNamespace(training=True), query, key, value, None, scaling=0.1, layout=layout)
    if out.requires_grad:
        out.sum().backward()


def main() -> None:
    """Compile, and print the graphs, the calls of SDPA, and what each kernel of attention takes."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("card", "dtype", "heads", "lengths"):
        parser.add_argument(name)
    parser.add_argument("--kinds", default="trained")
    parser.add_argument("--graphs-only", action="store_true", help="leave out ptxas")
    asked = parser.parse_args()

    compiled, sdpa = Compiled(asked.card), []
    # torch chooses SDPA's kernel by asking the driver
    F.scaled_dot_product_attention = lambda query, *_, **__: sdpa.append(query.shape) or query
    query_heads, key_heads, size = map(int, asked.heads.split("/"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        for length in map(int, asked.lengths.split(",")):
            for kind in asked.kinds.split(","):
                attend((query_heads, key_heads, size), getattr(torch, asked.dtype), length, kind)

    kernels = [] if asked.graphs_only else [kernel for kernel in compiled.kernels if "tem_fused" in kernel[0]]
    taken = [{"backward": "backward" in name} | compiled.taken(name, source) for name, source in kernels]
    print(json.dumps({"graphs": compiled.graphs, "sdpa": len(sdpa), "kernels": taken}))


if __name__ == "__main__":
    main()
