"""A CUDA runtime and driver without a card, for the tests of this folder."""

import subprocess
from pathlib import Path

import pytest

from tests.proofs.cuda_torch import CUDA_TORCH


@pytest.fixture(scope="session")
def runtime(tmp_path_factory) -> Path:
    """The folder of cuda.c, compiled as the CUDA runtime and as the driver."""
    folder = tmp_path_factory.mktemp("cuda")
    source, headers = Path(__file__).with_name("cuda.c"), CUDA_TORCH / "triton/backends/nvidia/include"
    for name in ("cudart.so", "libcuda.so.1"):
        command = ["gcc", "-w", "-shared", "-fPIC", "-I", headers, f"-Wl,-soname,{name}", "-o", folder / name, source]
        subprocess.run(command, check=True)

    plugin = folder / "plugin/null_card-1.dist-info"  # what torch loads in every process that has it in its path
    plugin.mkdir(parents=True)
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: null-card\nVersion: 1\n")
    (plugin / "entry_points.txt").write_text("[torch.backends]\nnull_card = tests.proofs.null_process:prepare\n")
    return folder
