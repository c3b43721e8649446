"""The CUDA build of torch takes the allocator's setting at run time; the CPU build takes anything."""

from tests.proofs.cuda_torch import NEEDED, run

pytestmark = NEEDED
CODE = """
import torch
from smolray.engine.allocator import expand_segments
expand_segments({})
try:
    torch._C._accelerator_setAllocatorSettings("growing_segments:True")
except ValueError as error:
    print(error)
"""


def test_segments_that_grow_are_a_setting_of_torch(runtime):
    assert "Unrecognized key 'growing_segments'" in run(runtime, "-c", CODE)
