"""FlexAttention compiled for cards that are not here, by the CUDA build of torch and the real ptxas (`make
cuda-proofs`): at every length, for the heads of every model, within what a card has.

Marked slow: the other pairs of a card and a model (`make cuda-proofs ARGS="-m slow"`).
"""

import json
import random
from pathlib import Path

import pytest

from tests.proofs.cuda_torch import NEEDED, run

HEADS = {"tiny": "4/2/24", "256m": "9/3/64", "500m": "15/5/64", "2.2b": "32/32/64"}
SHARED_BYTES = {"a100": 166912, "rtx3090": 101376, "rtx4090": 101376, "h100": 232448}  # of a block, at most
SPILT = {"a100": 0, "rtx3090": 0, "rtx4090": 0, "h100": 64}  # bytes of registers, at most, in the forward pass
CHOSEN = [
    ("rtx3090", "bfloat16", "tiny"),
    ("rtx3090", "bfloat16", "256m"),
    ("rtx3090", "float32", "256m"),
    ("rtx4090", "float16", "500m"),
    ("a100", "bfloat16", "2.2b"),
    ("h100", "bfloat16", "256m"),
]
OTHERS = [(card, dtype, model) for card in SHARED_BYTES for dtype in ("bfloat16", "float32") for model in HEADS]

pytestmark = NEEDED


def compiled(runtime: Path, *arguments: str) -> dict:
    """What compile_attention.py prints."""
    return json.loads(run(runtime, "-m", "tests.proofs.compile_attention", *arguments).splitlines()[-1])


def spilt(kernels: list[dict], backward: bool) -> int:
    """Bytes of registers that the worst kernel of a direction spills."""
    return max(kernel["stack_bytes"] for kernel in kernels if kernel["backward"] == backward)


@pytest.mark.parametrize(
    ("card", "dtype", "model"),
    [*CHOSEN, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS if case not in CHOSEN)],
)
def test_every_length_compiles_within_the_shared_memory_of_the_card(runtime, card, dtype, model):
    found = compiled(runtime, card, dtype, HEADS[model], "1000,1100,80,1")
    kernels = found["kernels"]
    shared, forward, backward = max(k["shared_bytes"] for k in kernels), spilt(kernels, False), spilt(kernels, True)
    print(
        f"{card} {dtype} {model}: {found['graphs']} graphs, {shared:,} of {SHARED_BYTES[card]:,} bytes shared, "
        f"registers spilt {forward} bytes forward, {backward} backward"
    )

    assert {kernel["backward"] for kernel in kernels} == {False, True} and not found["sdpa"]
    assert shared <= SHARED_BYTES[card]
    if dtype != "float32":
        assert all(kernel["tensor_core_instructions"] for kernel in kernels)
        assert forward <= SPILT[card], "the options of model/attention.py leave registers enough"


def test_lengths_share_their_graphs(runtime):
    rng = random.Random(0)
    lengths = [1000, *rng.sample(range(1, 1001), 40), *rng.sample(range(1, 141), 10), 1, 127, 128, 129, 256, 512]
    arguments = ("rtx3090", "bfloat16", HEADS["256m"], ",".join(map(str, lengths)))
    found = compiled(runtime, *arguments, "--kinds", "trained,adapters,evaluated,frozen", "--graphs-only")
    print(f"{found['graphs']} graphs for {len(set(lengths))} lengths of four kinds")
    assert 0 < found["graphs"] <= 25


@pytest.mark.parametrize("model", HEADS)
def test_a_card_below_8_0_takes_sdpa_and_compiles_nothing(runtime, model):
    found = compiled(runtime, "t4", "float16", HEADS[model], "1000,80,1")
    assert found == {"graphs": 0, "sdpa": 3, "kernels": []}
