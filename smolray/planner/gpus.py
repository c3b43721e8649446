"""One GPU as the planner sees it, and the makers' figures of those that people own.

In: nothing. Out: KNOWN_GPUS by name.
"""

from dataclasses import dataclass

from smolray.config.devices import Capability, no_bf16, no_kernels
from smolray.planner.assumptions import CUDA_CONTEXT, FRAGMENTATION, HEADROOM

MIB = 2**20
BF16: Capability = (8, 0)  # from this compute capability on GPUs have bf16 units


@dataclass(frozen=True)
class GPU:
    """One accelerator.

    Speeds are for dense matrices with fp32 accumulation; fp32 is without TF32 (torch's default).
    """

    name: str
    memory: int  # bytes
    tflops_16: float  # fp16 or bf16
    tflops_32: float
    bandwidth: float  # bytes/s of its memory
    bf16: bool = True
    measured: bool = False  # the speeds were measured with a matmul; otherwise they are the manufacturer's
    host: bool = False  # a CPU: it has nothing to offload to
    capability: Capability | None = None  # compute capability, where it is known
    # What `make gpu` measured of it (calibration.py), else estimates: bytes of the CUDA context, what the allocator
    # reserves on top as a share, and seconds of a step over the predicted ones.
    context: float = CUDA_CONTEXT
    fragmentation: float = FRAGMENTATION
    slowdown: float = 1.0

    def __hash__(self) -> int:
        """Of two fields: it is the key of many caches."""
        return hash((self.name, self.memory))

    @property
    def usable(self) -> int:
        """Bytes that a plan may fill."""
        return int(self.memory * (1 - HEADROOM))

    def tflops(self, dtype: str) -> float:
        """TFLOP/s in a dtype as model.dtype names it. A GPU without bf16 units computes bf16 at its fp32 speed."""
        return self.tflops_32 if dtype == "float32" or (dtype == "bfloat16" and not self.bf16) else self.tflops_16

    def cannot_run(self, dtype: str) -> str:
        """Why a run in a dtype is refused on this GPU (train/setup.py, check_device); empty where it is not."""
        if self.capability is not None and (missing := no_kernels(self.name, self.capability)):
            return missing
        return no_bf16(self.name) if dtype == "bfloat16" and not self.bf16 else ""


def _gpu(name: str, mib: int, tflops_16: float, tflops_32: float, gb_per_s: float, capability: Capability) -> GPU:
    return GPU(name, mib * MIB, tflops_16, tflops_32, gb_per_s * 1e9, capability >= BF16, capability=capability)


# Memory in MiB as nvidia-smi shows it; TFLOP/s and GB/s from NVIDIA's published figures: the Turing, Ampere GA102, Ada
# and Blackwell architecture whitepapers (GeForce tensor cores with fp32 accumulation run at twice the shader rate), and
# the data sheets of T4, V100, A10, A100, L4, L40S, RTX A4000 / A5000 / A6000, RTX 6000 Ada, H100 and H200.
KNOWN_GPUS: dict[str, GPU] = {
    gpu.name: gpu
    for gpu in (
        _gpu("t4", 15360, 65, 8.1, 320, (7, 5)),
        _gpu("v100-16", 16384, 125, 15.7, 900, (7, 0)),
        _gpu("v100-32", 32768, 125, 15.7, 900, (7, 0)),
        _gpu("rtx2060", 6144, 25.8, 6.5, 336, (7, 5)),
        _gpu("rtx2070", 8192, 29.9, 7.5, 448, (7, 5)),
        _gpu("rtx2080", 8192, 40.3, 10.1, 448, (7, 5)),
        _gpu("rtx2080ti", 11264, 53.8, 13.4, 616, (7, 5)),
        _gpu("rtx3060", 12288, 25.5, 12.7, 360, (8, 6)),
        _gpu("rtx3060ti", 8192, 32.4, 16.2, 448, (8, 6)),
        _gpu("rtx3070", 8192, 40.6, 20.3, 448, (8, 6)),
        _gpu("rtx3070ti", 8192, 43.5, 21.7, 608, (8, 6)),
        _gpu("rtx3080", 10240, 59.5, 29.8, 760, (8, 6)),
        _gpu("rtx3080ti", 12288, 68.2, 34.1, 912, (8, 6)),
        _gpu("rtx3090", 24576, 71, 35.6, 936, (8, 6)),
        _gpu("rtx3090ti", 24564, 80, 40, 1008, (8, 6)),
        _gpu("rtx4060", 8188, 30.2, 15.1, 272, (8, 9)),
        _gpu("rtx4060ti-8", 8188, 44.1, 22.1, 288, (8, 9)),
        _gpu("rtx4060ti", 16380, 44.1, 22.1, 288, (8, 9)),
        _gpu("rtx4070", 12282, 58.3, 29.1, 504, (8, 9)),
        _gpu("rtx4070super", 12282, 71, 35.5, 504, (8, 9)),
        _gpu("rtx4070ti", 12282, 80.2, 40.1, 504, (8, 9)),
        _gpu("rtx4070tisuper", 16376, 88.2, 44.1, 672, (8, 9)),
        _gpu("rtx4080", 16376, 97.5, 48.7, 717, (8, 9)),
        _gpu("rtx4080super", 16376, 104.4, 52.2, 736, (8, 9)),
        _gpu("rtx4090", 24564, 165.2, 82.6, 1008, (8, 9)),
        _gpu("rtx5070", 12227, 61.7, 30.9, 672, (12, 0)),
        _gpu("rtx5070ti", 16303, 87.9, 43.9, 896, (12, 0)),
        _gpu("rtx5080", 16303, 112.6, 56.3, 960, (12, 0)),
        _gpu("rtx5090", 32607, 209.5, 104.8, 1792, (12, 0)),
        _gpu("rtxa4000", 16376, 76.7, 19.2, 448, (8, 6)),
        _gpu("rtxa5000", 24564, 111.1, 27.8, 768, (8, 6)),
        _gpu("rtxa6000", 49140, 154.8, 38.7, 768, (8, 6)),
        _gpu("rtx6000ada", 49140, 364.2, 91.1, 960, (8, 9)),
        _gpu("a10", 23028, 125, 31.2, 600, (8, 6)),
        _gpu("a10g", 23028, 70, 35, 600, (8, 6)),
        _gpu("a100-40", 40960, 312, 19.5, 1555, (8, 0)),
        _gpu("a100-80", 81920, 312, 19.5, 2039, (8, 0)),
        _gpu("l4", 23034, 121, 30.3, 300, (8, 9)),
        _gpu("l40s", 46068, 362, 91.6, 864, (8, 9)),
        _gpu("h100", 81559, 989, 67, 3350, (9, 0)),
        _gpu("h100pcie", 81559, 756, 51, 2000, (9, 0)),
        _gpu("h200", 143771, 989, 67, 4800, (9, 0)),
    )
}

# How torch and Ray name GPUs whose names contain more than the model.
ALIASES = {
    "a100": "a100-40",
    "a100sxm440gb": "a100-40",
    "a100pcie40gb": "a100-40",
    "a100sxm480gb": "a100-80",
    "a100pcie80gb": "a100-80",
    "a10080gbpcie": "a100-80",
    "v100": "v100-16",
    "v100sxm216gb": "v100-16",
    "v100pcie16gb": "v100-16",
    "v100sxm232gb": "v100-32",
    "v100pcie32gb": "v100-32",
    "h10080gbhbm3": "h100",
    "h100sxm": "h100",
    "rtx6000adageneration": "rtx6000ada",
    "rtx4060ti8gb": "rtx4060ti-8",
}
