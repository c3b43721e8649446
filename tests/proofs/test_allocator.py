"""The CUDA build of torch takes the allocator's setting at run time; the CPU build takes anything."""

from smolray.engine.allocator import SETTING
from tests.proofs.cuda_torch import NEEDED, run

pytestmark = NEEDED
UNKNOWN = """
import torch
try:
    torch._C._accelerator_setAllocatorSettings("growing_segments:True")
except ValueError as error:
    print(error)
"""
ALLOCATE = """
import torch
from smolray.engine.allocator import expand_segments
expand_segments({})
print(torch.zeros(1, device="cuda").item())
"""


def test_segments_that_grow_are_a_setting_of_torch(runtime):
    assert SETTING.startswith("expandable_segments:")
    code = UNKNOWN.replace("growing_segments:True", SETTING)
    assert run(runtime, "-c", code) == ""
    assert "Unrecognized key 'growing_segments'" in run(runtime, "-c", UNKNOWN)


def test_a_worker_allocates_where_the_management_library_is_missing(runtime):
    """The card of cuda.c has none. With segments that grow, torch crashes there."""
    assert run(runtime, "-c", ALLOCATE) == "0.0\n"
