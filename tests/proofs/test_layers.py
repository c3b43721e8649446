"""Compiled layers and Liger's kernels (model.compile, model.use_liger_kernel) before a card that is not here (`make
cuda-proofs`): how many graphs lengths take, and the numbers of the kernels by Triton's interpreter.
"""

import json

import pytest

from tests.proofs.cuda_torch import CUDA_TORCH, NEEDED, run

pytestmark = NEEDED
MOST_GRAPHS = 55  # of training, evaluation and checkpointed training; forward and backward are two


def test_lengths_and_numbers_of_tiles_share_the_graphs_of_the_layers(runtime):
    lengths = [1000, 431, 700, 80, 127, 128, 129, 256, 999, 3]
    arguments = ("rtx3090", "random-256m", ",".join(map(str, lengths)), "3,17,1")
    graphs = json.loads(run(runtime, "-m", "tests.proofs.compile_layers", *arguments).splitlines()[-1])
    print(f"graphs for {len(lengths)} lengths with 3 numbers of tiles: {graphs}")
    assert graphs.pop("attention"), "FlexAttention is compiled by itself, inside of layers that are"
    assert graphs["trained"] and sum(graphs.values()) <= MOST_GRAPHS


@pytest.mark.skipif(not (CUDA_TORCH / "liger_kernel").exists(), reason="needs liger-kernel beside the CUDA torch")
@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_with_liger_outputs_losses_and_gradients_are_those_of_the_model_alone(runtime, loss):
    told = run(runtime, "-m", "tests.proofs.interpret_liger", loss, TRITON_INTERPRET="1")
    found = json.loads(told.splitlines()[-1])
    print(f"{loss}: largest errors, and modules replaced: {found}")
    assert found.pop("head") and found.pop("FusedRMSNorm") == 7 and found.pop("FusedMLP") == 3
    assert found.keys() >= {"hidden", "loss", "gradients"}
    assert max(found.values()) < 1e-5
