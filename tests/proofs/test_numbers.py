"""The kernels that Inductor writes for FlexAttention have the numbers of SDPA: Triton's interpreter runs them on a CPU
(`make cuda-proofs`).
"""

import json

import pytest

from tests.proofs.cuda_torch import NEEDED, run

pytestmark = NEEDED


@pytest.mark.parametrize("heads", ["4/2/24", "9/3/64"])
def test_outputs_and_gradients_are_those_of_sdpa_group_by_group(runtime, heads):
    told = run(runtime, "-m", "tests.proofs.interpret_attention", heads, TRITON_INTERPRET="1")
    errors = json.loads(told.splitlines()[-1])
    print(f"{heads}: largest errors {errors}")
    assert errors.keys() == {"output", "query", "key", "value"}
    assert max(errors.values()) < 1e-5
