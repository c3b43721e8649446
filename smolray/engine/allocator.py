"""How torch's allocator takes memory from a GPU.

In: the environment of a worker. Out: nothing; it holds for what the process allocates from then on.
"""

from collections.abc import Mapping

import torch

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
SETTING = "expandable_segments:True"


def expand_segments(environment: Mapping[str, str]) -> None:
    """Take segments that grow: of fixed ones, sequences of changing lengths leave parts that nothing fits into.

    Where the environment sets the allocator, that holds.
    """
    if not any(name in environment for name in VARIABLES):
        torch._C._accelerator_setAllocatorSettings(SETTING)
