"""How torch's allocator takes memory from a GPU.

In: the environment of a worker. Out: nothing; it holds for what the process allocates from then on.
"""

import ctypes
from collections.abc import Mapping

import torch

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
SETTING = "expandable_segments:True"
MANAGEMENT = "libnvidia-ml.so.1"


def expand_segments(environment: Mapping[str, str]) -> None:
    """Take segments that grow: of fixed ones, sequences of changing lengths leave parts that nothing fits into.

    Where the environment sets the allocator, that holds. Segments stay fixed where NVIDIA's management library is
    missing, as in a container that was given the driver's `compute` parts alone: torch 2.13 asks it about the GPU when
    it first takes such a segment, and crashes.
    """
    if any(name in environment for name in VARIABLES):
        return
    try:
        ctypes.CDLL(MANAGEMENT)
    except OSError:
        return
    torch._C._accelerator_setAllocatorSettings(SETTING)
