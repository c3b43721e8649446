"""What the machine is, and whether this torch was built for it."""

from functools import partial

import torch

from jobs.gpu.check import Check, Figures, expect
from jobs.gpu.timing import timed
from smolray.cluster.nvml import driver_version
from smolray.planner.probe import copy_bandwidth


def build(device: torch.device) -> Figures:
    """Driver, CUDA, capability, architectures."""
    properties = torch.cuda.get_device_properties(device)
    own, built = f"sm_{properties.major}{properties.minor}", torch.cuda.get_arch_list()
    figures = {
        "gpu": properties.name,
        "driver": driver_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "architecture": own,
        "built_for": built,
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        "memory_gib": round(properties.total_memory / 2**30, 2),
        "multiprocessors": properties.multi_processor_count,
    }
    # code of one major version runs on its later minor versions
    same = any(b.startswith(f"sm_{properties.major}") and int(b[3:]) <= int(own[3:]) for b in built if b[3:].isdigit())
    return expect(same, f"this torch has no code for {own}: install one that has", figures)


def context(device: torch.device) -> Figures:
    """Memory that CUDA itself takes, which no allocator counts."""
    torch.zeros(1, device=device)
    free, total = torch.cuda.mem_get_info(device)
    taken = (total - free - torch.cuda.memory_reserved(device)) / 2**20
    return expect(taken < 2048, "something else uses this GPU", {"context_mib": round(taken)})


def arithmetic(device: torch.device) -> Figures:
    """Teraflop/s of a large product in 16 bit and fp32, and gigabytes a second that a copy reads and writes."""
    figures: Figures = {"copy_gb_a_second": round(copy_bandwidth(device) / 1e9, 1)}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        left = torch.randn(4096, 4096, device=device).to(dtype)
        seconds = timed(partial(torch.matmul, left, left), device, repetitions=10)
        figures[f"tflops_{str(dtype).removeprefix('torch.')}"] = round(2 * 4096**3 / seconds / 1e12, 1)
    return figures


CHECKS = (
    Check("build", "Is this torch built for the GPU, and which driver is there?", build),
    Check("context", "How much memory does CUDA itself take?", context),
    Check("arithmetic", "How fast are its matrix products and its memory?", arithmetic),
)
