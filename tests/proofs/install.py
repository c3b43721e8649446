"""Put the CUDA build of torch into a folder of its own, or say why not. `python -m tests.proofs.install FOLDER`.

pip gets the version of the torch that is installed here. It needs no GPU, 2 GB from the package index and 4.5 GB of
disk.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

GIB = 2**30
NEEDED_GIB = 8  # the wheels, and what is unpacked from them


def installed(folder: Path, version: str) -> bool:
    """Whether the folder holds this version of torch, with CUDA."""
    found = importlib.metadata.distributions(path=[str(folder)])
    versions = {d.version for d in found if d.name == "torch"}
    return versions == {version} and (folder / "torch/lib/libtorch_cuda.so").exists()


def install(folder: Path, version: str) -> str | None:
    """Install it; None, or why it is not there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < NEEDED_GIB * GIB:
        return f"{folder.parent} has {free / GIB:.1f} GiB free, and {NEEDED_GIB} are needed"

    parts = folder.with_name(f"{folder.name}.parts")
    shutil.rmtree(folder, ignore_errors=True)
    parts.mkdir(exist_ok=True)
    # `===` is this very release: `==` would also take a CPU build of it
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    command += ["--ignore-installed", "--retries", "1", "--target", str(folder), f"torch==={version}"]
    done = subprocess.run(command, env=os.environ | {"TMPDIR": str(parts)}, stderr=subprocess.PIPE, text=True)
    shutil.rmtree(parts)
    if installed(folder, version):
        return None

    shutil.rmtree(folder, ignore_errors=True)
    said = done.stderr.strip().splitlines() or ["the index has no CUDA build of it for this machine"]
    return f"pip could not install torch {version}: {said[-1]}"


def main(folder: str) -> None:
    """Print what is there, or why it is not."""
    version = importlib.metadata.version("torch").split("+")[0]
    if not installed(Path(folder), version):
        print(f"installing the CUDA build of torch {version} into {folder}", flush=True)
        if problem := install(Path(folder), version):
            print(f"skipped: {problem}")


if __name__ == "__main__":
    main(sys.argv[1])
