"""Put the CUDA build of torch, and Liger's kernels, into a folder of their own, or say why not.

`python -m tests.proofs.install FOLDER`: pip gets the version of the torch that is installed here, and Liger's of
constraints.txt. It needs no GPU, 2 GB from the package index and 4.5 GB of disk.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
GIB = 2**30
NEEDED_GIB = 8  # the wheels, and what is unpacked from them


def installed(folder: Path, package: str, version: str) -> bool:
    """Whether the folder holds this version of a package; of torch, with CUDA."""
    found = importlib.metadata.distributions(path=[str(folder)])
    versions = {d.version for d in found if d.name.replace("_", "-") == package}
    with_cuda = package != "torch" or (folder / "torch/lib/libtorch_cuda.so").exists()
    return versions == {version} and with_cuda


def install(folder: Path, version: str) -> str | None:
    """Install torch; None, or why it is not there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < NEEDED_GIB * GIB:
        return f"{folder.parent} has {free / GIB:.1f} GiB free, and {NEEDED_GIB} are needed"

    shutil.rmtree(folder, ignore_errors=True)
    # `===` is this very release: `==` would also take a CPU build of it
    said = pip(folder, f"torch==={version}")
    if installed(folder, "torch", version):
        return None

    shutil.rmtree(folder, ignore_errors=True)
    return f"pip could not install torch {version}: {said or 'the index has no CUDA build of it for this machine'}"


def pip(folder: Path, *requested: str) -> str:
    """Install into the folder; the last line of what pip said of an error."""
    parts = folder.with_name(f"{folder.name}.parts")
    parts.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    command += ["--ignore-installed", "--retries", "1", "--target", str(folder), *requested]
    done = subprocess.run(command, env=os.environ | {"TMPDIR": str(parts)}, stderr=subprocess.PIPE, text=True)
    shutil.rmtree(parts)
    return (done.stderr.strip().splitlines() or [""])[-1]


def liger_version() -> str:
    """The version of liger-kernel that goes with this smolray."""
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    found = re.search(r"^liger-kernel==(.+)$", pinned, re.MULTILINE)
    assert found is not None
    return found.group(1)


def main(folder: str) -> None:
    """Print what is there, or why it is not."""
    version, liger = importlib.metadata.version("torch").split("+")[0], liger_version()
    if not installed(Path(folder), "torch", version):
        print(f"installing the CUDA build of torch {version} into {folder}", flush=True)
        if problem := install(Path(folder), version):
            print(f"skipped: {problem}")
            return
    if not installed(Path(folder), "liger-kernel", liger):
        said = pip(Path(folder), "--no-deps", f"liger-kernel=={liger}")  # Triton came with torch
        if not installed(Path(folder), "liger-kernel", liger):
            print(f"its tests are skipped: pip could not install liger-kernel {liger}: {said}")


if __name__ == "__main__":
    main(sys.argv[1])
