"""The CUDA build of torch as the tests of this folder start it: in a process of its own, before a pretended driver."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CUDA_TORCH = Path(os.environ.get("SMOLRAY_CUDA_TORCH", "")).absolute()
NEEDED = [
    pytest.mark.skipif(
        not (CUDA_TORCH / "torch/lib/libtorch_cuda.so").exists(),
        reason="needs the CUDA build of torch in a folder of its own: make cuda-proofs",
    ),
    pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc, for a CUDA runtime without a card"),
]


def environment(runtime: Path, **variables: str) -> dict[str, str]:
    """Of a process with the CUDA build of torch. `runtime`: the folder of cuda.c, compiled (conftest.py)."""
    return os.environ | {
        "PYTHONPATH": f"{CUDA_TORCH}:{ROOT}",
        "LD_LIBRARY_PATH": str(runtime),
        "LD_PRELOAD": str(runtime / "cudart.so"),
        "TRITON_LIBCUDA_PATH": str(runtime),
        "TRITON_CACHE_DIR": str(runtime / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(runtime / "inductor"),
        **variables,
    }


def on_null(runtime: Path) -> dict[str, str]:
    """Of a process, and of all that it starts, on the card of cuda.c (null_process.py)."""
    path = f"{CUDA_TORCH}:{ROOT}:{runtime / 'plugin'}"
    return environment(runtime, PYTHONPATH=path, DS_ACCELERATOR="cuda", TORCHINDUCTOR_COMPILE_THREADS="1")


def run(runtime: Path, *arguments: str, **variables: str) -> str:
    """What a Python with the CUDA build of torch prints. `variables`: of the environment, besides."""
    started = [sys.executable, *arguments]
    done = subprocess.run(started, capture_output=True, text=True, env=environment(runtime, **variables), cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
