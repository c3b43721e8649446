"""A CUDA runtime and driver without a card, for the tests of this folder."""

import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def runtime(tmp_path_factory) -> Path:
    """The folder of cuda.c, compiled as the CUDA runtime and as the driver."""
    folder = tmp_path_factory.mktemp("cuda")
    source = Path(__file__).with_name("cuda.c")
    for name in ("cudart.so", "libcuda.so.1"):
        command = ["gcc", "-w", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", folder / name, source]
        subprocess.run(command, check=True)
    return folder
