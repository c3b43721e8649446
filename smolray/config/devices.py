"""What a CUDA device can run: the architectures that torch was built for, and bf16.

In: names, compute capabilities, architectures as torch.cuda.get_arch_list() names them. Out: what is wrong, in words,
or an empty text. The planner, the doctor and a worker say the same.
"""

import re
from collections.abc import Collection

Capability = tuple[int, int]

# source: torch 2.13, torch.cuda.get_arch_list() of the wheel for CUDA 13
WHEEL_ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")


def no_kernels(name: str, capability: Capability, architectures: Collection[str] = WHEEL_ARCHITECTURES) -> str:
    """Why no kernel of a build of torch runs on a GPU.

    Code for sm_86 runs on 8.6 and 8.9: on its own generation, from its own number on. Code for compute_90 (PTX) runs on
    everything newer.
    """
    for architecture in architectures:
        kind, digits = re.fullmatch(r"(sm|compute)_(\d+)[a-z]?", architecture).groups()  # type: ignore[union-attr]
        built = int(digits[:-1]), int(digits[-1])
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return ""
    return (
        f"{name} has compute capability {capability[0]}.{capability[1]}, and this torch is built for "
        f"{', '.join(architectures)}; nearest: a build of torch for an older CUDA, or another GPU"
    )


def no_bf16(name: str) -> str:
    """What is said of a run in bf16 on a GPU without bf16 units."""
    return f"model.dtype = bfloat16: {name} has no bf16 units; allowed there: float16, float32; nearest: float16"
